"""The agent on another machine: the whole job is signalled, its connection ends, its greeting takes long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ardist.launch.engines import Host, Placement
from ardist.launch.local import free_port
from ardist.launch.wire import line, pack_placement

HERE = Path(__file__).parent


@pytest.fixture
def working(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An agent whose one toy rank has made a step of 0.2 s."""
    placement = Placement((Host("localhost", 1),), 0, "127.0.0.1", free_port())
    program = ["toy_rank", str(tmp_path), "400", "0.2"]
    order = {"placement": pack_placement(placement), "program": program, "engine": "plain", "debug": False}
    process = subprocess.Popen(
        [sys.executable, "-m", "ardist.launch.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
        start_new_session=True,
        bufsize=0,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(line({"do": "start", **order, "environment": {}}))
        end = time.monotonic() + 100
        while not (tmp_path / "history").exists():
            assert time.monotonic() < end, "it did not start"
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.stdin.close()
            process.wait(100)


def test_ranks_that_were_signalled_save_though_the_connection_ends(
    tmp_path: Path, working: subprocess.Popen[bytes]
) -> None:
    everything = [psutil.Process(working.pid), *psutil.Process(working.pid).children(recursive=True)]
    for process in everything:
        process.send_signal(signal.SIGTERM)
    assert working.stdin is not None
    working.stdin.close()
    assert working.wait(100) == 4
    made = (tmp_path / "history").read_text().split()
    assert (tmp_path / "saved").read_text() == made[-1]
    assert not any(process.is_running() for process in everything)


def test_without_a_signal_the_end_of_the_connection_is_the_end(
    tmp_path: Path, working: subprocess.Popen[bytes]
) -> None:
    ranks = psutil.Process(working.pid).children(recursive=True)
    assert working.stdin is not None
    working.stdin.close()
    assert working.wait(100) == 4
    assert not any(process.is_running() for process in ranks)
    assert not (tmp_path / "stop-after").exists(), "nobody asked it to save"


SLOW = """
import sys, time
from ardist.config.launch import LaunchConfig
from ardist.launch import agent
monotonic, late = time.monotonic, [0.0]
agent.time.monotonic = lambda: monotonic() + late[0]
def greet(self, message):
    self._limits = LaunchConfig(node_seconds=100.0)
    late[0] = 150.0
    self._say({"hello": "late"})
agent.Agent._greet = greet
sys.exit(agent.main())
"""


def test_a_greeting_that_takes_long_is_no_silence_of_the_supervisor() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line({"do": "greet"}))
    while b"hello" not in (said := process.stdout.readline()):
        assert said, "it left"
    process.stdin.write(line({"do": "end"}))
    assert process.wait(100) == 0
