"""The run directory's lock between a job and its successor: one that is dying is waited for, one that runs is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ardist.config.launch import LaunchConfig
from ardist.errors import ConfigError
from ardist.launch.nodes import LocalNode
from ardist.process_identity import began
from ardist.training.run_dir import GRACE_VARIABLE, LAUNCHER_VARIABLE, RunDirectory, launcher_is_gone

HOLDER = """
import sys
from ardist.training.run_dir import RunDirectory
held = RunDirectory(sys.argv[1])
held.make()
held.lock()
print("held", flush=True)
sys.stdin.read()
"""


def hold(run_dir: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A rank of a job that holds the lock until its input ends."""
    words = [sys.executable, "-c", HOLDER, str(run_dir)]
    holder = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **variables}, bufsize=0
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


@pytest.fixture
def gone() -> str:
    """The identity of a launcher that has ended."""
    ended = subprocess.Popen(["sleep", "60"])
    identity = f"{ended.pid}:{began(ended.pid)}"
    ended.kill()
    ended.wait()
    return identity


def test_a_dying_job_has_its_grace_to_save(tmp_path: Path, gone: str) -> None:
    holder = hold(tmp_path, **{LAUNCHER_VARIABLE: gone, GRACE_VARIABLE: "60"})
    assert holder.stdin is not None
    end = subprocess.Popen(["sleep", "1.5"], stdin=subprocess.DEVNULL, stdout=holder.stdin)
    holder.stdin.close()  # the sleeping one still has it
    run = RunDirectory(tmp_path)
    run.lock(wait_seconds=0.1)
    run.unlock()
    assert (end.wait(60), holder.wait(60)) == (0, 0)


def test_a_reused_process_id_is_no_launcher() -> None:
    me = psutil.Process()
    assert not launcher_is_gone(f"{me.pid}:{began(me.pid)}")
    assert launcher_is_gone(f"{me.pid}:1.0")


def test_its_grace_ends(tmp_path: Path, gone: str) -> None:
    holder = hold(tmp_path, **{LAUNCHER_VARIABLE: gone, GRACE_VARIABLE: "0.3"})
    try:
        with pytest.raises(ConfigError, match="another job is running"):
            RunDirectory(tmp_path).lock(wait_seconds=0.1)
    finally:
        holder.kill()
        holder.wait()


def test_a_job_that_runs_is_named_at_once(tmp_path: Path) -> None:
    node = LocalNode("localhost", LaunchConfig(grace_seconds=1e6))
    holder = hold(tmp_path, **node.variables)
    try:
        with pytest.raises(ConfigError, match=f"{holder.pid}"):
            RunDirectory(tmp_path).lock(wait_seconds=0.1)
    finally:
        holder.kill()
        holder.wait()
        node.kill()
