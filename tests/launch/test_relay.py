"""What DeepSpeed starts through pdsh in place of a rank: it becomes the rank, and ends with the connection."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ardist.config.launch import LaunchConfig
from ardist.launch import processes
from ardist.launch.engines import Launch
from ardist.launch.pdsh import PdshNode, handed_on
from ardist.launch.wire import decode, encode
from ardist.process_identity import machine_id
from ardist.training.heartbeat import DIRECTORY_VARIABLE

WORDS = ['it\'s $(not) a `shell`; "&" | > * ? \\', "two  blanks", "", "line\nend"]
TELL = """
import json, os, sys, time
with open(os.environ["ARDIST_TOLD"] + ".new", "w") as file:
    told = {"words": sys.argv[1:], "environment": dict(os.environ), "input": sys.stdin.read(), "pid": os.getpid()}
    json.dump(told, file)
os.rename(os.environ["ARDIST_TOLD"] + ".new", os.environ["ARDIST_TOLD"])
time.sleep(600)
"""


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def relay(directory: Path, machine: str, scratch: Path) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """Start it as DeepSpeed would, and what the rank that it became told."""
    (directory / "tell.py").write_text(TELL)
    message = {
        "program": ["tell", *WORDS],
        "hosts": ["127.0.0.1", "192.0.2.2"],
        "environment": {"ARDIST_TOLD": str(directory / "told"), "ARDIST_ODD": WORDS[0]},
        "mark": f"mark-{directory.name}",
        "machine": machine,
        "watched": {DIRECTORY_VARIABLE: str(scratch), processes.VARIABLE: f"mark-{directory.name}"},
    }
    given = {"CROSS_RANK": "0", "LOCAL_SIZE": "1", "RANK": "0", "PYTHONPATH": str(directory)}
    words = [sys.executable, "-m", "ardist.launch.relay", "--local_rank=0", encode(message)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env={**os.environ, **given})
    wait_for((directory / "told").exists)
    return process, json.loads((directory / "told").read_text())


@pytest.mark.parametrize("here", [True, False])
def test_it_becomes_the_rank_and_ends_with_the_connection(tmp_path: Path, here: bool) -> None:
    process, told = relay(tmp_path, machine_id() if here else "another machine", tmp_path)
    assert process.stdin is not None
    try:
        assert told["pid"] == process.pid, "the launcher's child is the rank, so that its death is seen"
        assert told["words"] == WORDS
        assert told["input"] == "", "the connection's input is not the rank's"
        assert told["environment"]["ARDIST_ODD"] == WORDS[0]
        assert told["environment"]["GLOO_SOCKET_IFNAME"] == "lo"
        assert (DIRECTORY_VARIABLE in told["environment"]) == here, "only on that machine is somebody looking"
        assert processes.members(f"mark-{tmp_path.name}") == [process.pid]
        process.stdin.close()
        assert process.wait(100) == -signal.SIGKILL
    finally:
        process.kill()


def test_the_guard_goes_when_the_rank_is_done(tmp_path: Path) -> None:
    process, _ = relay(tmp_path, "another machine", tmp_path)
    [guard] = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
    wait_for(lambda: has_ended(guard))


def has_ended(process: psutil.Process) -> bool:
    """Also where nobody reaps it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_word_means_nothing_to_a_shell() -> None:
    word = encode({"words": WORDS})
    assert word.replace("-", "").replace("_", "").replace("=", "").isalnum()
    assert decode(word) == {"words": WORDS}


def test_what_looks_like_a_secret_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("UNRELATED", "canary")
    assert "canary" not in handed_on().values()
    assert handed_on()["AWS_REGION"] == "eu-north-1"


def test_the_launcher_of_deepspeed_never_gets_a_signal_that_kills_other_jobs(tmp_path: Path) -> None:
    node = PdshNode("pdsh", LaunchConfig())
    listen = f"signal.signal(15, lambda *_: open({str(tmp_path / 'asked')!r}, 'w'))"
    code = f"import signal, time; {listen}; open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(600)"
    node.start([Launch([sys.executable, "-c", code], {})], dict(os.environ))
    try:
        wait_for((tmp_path / "ready").exists)
        node.send_signal(signal.SIGTERM)
        wait_for(lambda: node.state().exit_code is not None)
        assert not (tmp_path / "asked").exists()
        assert processes.members(node.variables[processes.VARIABLE]) == []
    finally:
        node.kill()
