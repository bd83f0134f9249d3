"""Fault points do nothing by themselves and strike exactly where they are told to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ardist import fault


def test_silent_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fault.VARIABLE, raising=False)
    assert fault.point("test.silent") is None


def test_only_the_named_visit_of_the_named_rank_is_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, "raise@test.visit/0#2; raise@test.other")
    monkeypatch.setenv("RANK", "0")
    fault.point("test.visit")
    with pytest.raises(OSError, match="injected at test.visit"):
        fault.point("test.visit")
    fault.point("test.visit")
    monkeypatch.setenv(fault.VARIABLE, "raise@test.rank/1")
    fault.point("test.rank")


def test_values_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, "value@test.value:nan")
    assert fault.point("test.value") == "nan"


def test_waiting_ends_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tmp_path / "the gate"
    monkeypatch.setenv(fault.VARIABLE, f"wait@test.wait:{gate}")
    passed: list[bool] = []
    waiting = threading.Thread(target=lambda: (fault.point("test.wait"), passed.append(gate.exists())), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    gate.touch()
    waiting.join(60)
    assert passed == [True]


@pytest.mark.parametrize("text", ["explode@x", "kill", "kill@UPPER", "kill@x/y", "wait@x"])
def test_a_fault_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        fault.parse(text)


def test_kill_is_a_real_sigkill() -> None:
    code = "from ardist import fault; fault.point('test.kill'); print('survived')"
    environment = {**os.environ, fault.VARIABLE: "kill@test.kill"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -9
    assert "survived" not in done.stdout
