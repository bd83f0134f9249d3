"""launchers/train.sh from outside: exit codes come back, signals reach the ranks, nothing is left when it is killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import records, settings, write_latents

from ardist.launch.engines import MODULE
from ardist.training.commit import newest_valid

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "train.sh"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents of ours"))


def start(tmp_path: Path, data: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    config = tmp_path / "a config.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path / "the run", data, training__steps=400)))
    command: list[Any] = [SCRIPT, "--ranks", "2", config, *words]
    with open(tmp_path / "output.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})


def rank_processes(launcher: int) -> list[psutil.Process]:
    """The ranks that descend from a launcher."""
    found = []
    for child in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if ("-m", MODULE) in itertools.pairwise(child.cmdline()):
                found.append(child)
    return found


def wait_for_step(run_dir: Path, step: int) -> None:
    end = time.monotonic() + 150
    while time.monotonic() < end:
        if (run_dir / "metrics.jsonl").exists() and max(records(run_dir), default=0) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was never logged")


def test_exit_codes_and_paths_with_spaces(tmp_path: Path, data: Path) -> None:
    run = start(tmp_path, data, "training.steps=3", "training.stop_after=2")
    assert run.wait(150) == 75
    assert newest_valid(tmp_path / "the run" / "checkpoints")[1].step == 2
    run = start(tmp_path, data, "training.steps=3")
    assert run.wait(150) == 0
    run = start(tmp_path, data, "training.steps=three")
    assert run.wait(150) == 2
    assert "training.steps" in (tmp_path / "output.txt").read_text()


def test_a_signal_saves_and_a_killed_launcher_leaves_no_orphan(tmp_path: Path, data: Path) -> None:
    slow = {"ARDIST_FAULT": "sleep@trainer.batch:0.05"}
    run_dir = tmp_path / "the run"
    run = start(tmp_path, data, **slow)
    wait_for_step(run_dir, 3)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(150) == 75
    saved = newest_valid(run_dir / "checkpoints")[1].step
    assert 3 <= saved < 400

    run = start(tmp_path, data, **slow)
    wait_for_step(run_dir, saved + 3)
    ranks = rank_processes(run.pid)
    assert len(ranks) == 2
    run.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=100)
    assert len(gone) == 2, alive
    assert newest_valid(run_dir / "checkpoints")[1].step >= saved + 3, "what was done is saved even then"
