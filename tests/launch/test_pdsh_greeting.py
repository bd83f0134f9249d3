"""pdsh with connections that hang: they end with the question, and have limits of their own unless the user chose."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny import settings

from ardist.config import TrainConfig
from ardist.launch import pdsh
from ardist.launch.cluster import Order
from ardist.launch.engines import Host

pytestmark = pytest.mark.skipif(shutil.which("pdsh") is None, reason="there is no pdsh")
SSH = """#!/bin/sh
echo "$$" >> "$TOLD/pids"
echo "$@" >> "$TOLD/words"
case "$*" in
  *127.0.0.1*) echo '{"hello": "here"}' ;;
esac
exec sleep 600
"""


@pytest.mark.parametrize("chosen", [None, "PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND"])
def test_connections_that_hang_end_with_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TOLD", str(tmp_path))
    monkeypatch.setattr(pdsh, "GREETING_SECONDS", 6.0)
    for name in ("PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "-q %h" if chosen == "PDSH_SSH_ARGS" else "-q")
    config = TrainConfig.model_validate(settings(tmp_path / "run", tmp_path, launch={"node_seconds": 2}))
    hosts = (Host("127.0.0.1", 1), Host("192.0.2.9", 1))
    cluster = pdsh.PdshCluster(Order(config, "run.yaml", ()), hosts, None, None)
    _, answers, problems = cluster._greet_all(1)
    assert list(answers) == ["127.0.0.1"], "what was said in time counts"
    assert [name for name, _ in problems] == ["192.0.2.9"]
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()], "nothing is left of it"
    for words in (tmp_path / "words").read_text().splitlines():
        assert ("-o BatchMode=yes -o ConnectTimeout=10" in words) == (chosen is None)
        assert ("-q" in words.split()) == (chosen is not None)
