"""Many machines at once: all are asked and killed though some fail or do not answer, on a bounded number of threads."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from toy_jobs import Job

from ardist.config.launch import LaunchConfig
from ardist.events import events
from ardist.launch import nodes, processes, together
from ardist.launch.engines import Launch
from ardist.launch.nodes import LocalNode, State
from ardist.launch.supervisor import Supervisor
from ardist.launch.watchdog import Failure


class Machine:
    """One of many; its stacks and its end come only when all others are asked for theirs too."""

    ranks = watched = 1

    def __init__(self, name: str, met: dict[str, threading.Barrier], failure: Failure | None) -> None:
        self.name = name
        self.met = met
        self.failure = failure
        self.killed = False

    def state(self) -> State:
        return State(failure=self.failure)

    def send_signal(self, number: int) -> None:
        pass

    def stacks(self) -> dict[str, str]:
        self.met["stacks"].wait(60)
        if self.name == "1":
            raise OSError(errno.EIO, "this machine's disk is broken")
        return {f"stacks-rank-{self.name}.txt": "here"}

    def kill(self) -> None:
        self.met["kill"].wait(60)
        self.killed = True


def test_stacks_and_ends_of_many_machines_are_waited_for_together(tmp_path: Path) -> None:
    count = 8
    met = {what: threading.Barrier(count) for what in ("stacks", "kill")}
    failure = Failure("cut off", "gone", exit_code=4)
    machines = [Machine(str(number), met, failure if number == 2 else None) for number in range(count)]
    before = events.snapshot().get("launch.no_stacks", 0)
    assert Supervisor(LaunchConfig(max_restarts=0), tmp_path, lambda attempt, job: machines).run() == 4
    assert all(machine.killed for machine in machines)
    kept = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert kept == [f"attempt-001-stacks-rank-{number}.txt" for number in range(count) if number != 1]
    assert events.snapshot()["launch.no_stacks"] == before + 1


def test_the_number_of_threads_is_bounded_and_nobody_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "MAX_THREADS", 3)
    done, names = [], set()
    full = threading.Barrier(3)

    def act(number: int) -> int:
        names.add(threading.current_thread().name)
        if number < 3:
            full.wait(60)  # only if three run beside each other
        if number == 0:
            raise ValueError("the first fails")
        done.append(number)
        return number

    with pytest.raises(ValueError, match="the first fails"):
        together.together(act, range(20))
    assert sorted(done) == list(range(1, 20)), "one that fails keeps nobody else from his turn"
    assert len(names) == 3
    assert together.together(act, range(5, 9)) == [5, 6, 7, 8]
    assert together.together(act, []) == []


def test_no_room_for_a_process_at_a_restart_is_one_more_failure(tmp_path: Path) -> None:
    job = Job(tmp_path, max_restarts=3)
    job.fault(1, 7, "SIGKILL")
    start, refused = job.supervisor._start, []

    def crowded(attempt: int, name: str) -> object:
        if attempt in (2, 3):
            refused.append(attempt)
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(attempt, name)

    job.supervisor._start = crowded  # type: ignore[assignment]
    assert job.run() == 0
    assert refused == [2, 3]
    assert job.history == list(range(1, 13))


def test_it_is_not_tried_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path, max_restarts=2)
    job.fault(1, 7, "SIGKILL")
    start, refused = job.supervisor._start, []

    def crowded(attempt: int, name: str) -> object:
        if attempt > 1:
            refused.append(attempt)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return start(attempt, name)

    job.supervisor._start = crowded  # type: ignore[assignment]
    assert job.run() == 4
    assert refused == [2, 3], "max_restarts of them"


def test_when_one_process_cannot_be_started_none_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = LocalNode("localhost", LaunchConfig())
    monkeypatch.setattr(processes, "KILL_SECONDS", 30.0)
    ranks = [Launch(["sleep", "600"], {}), Launch([str(tmp_path / "nothing")], {})]
    with pytest.raises(FileNotFoundError):
        node.start(ranks, dict(os.environ))
    assert processes.members(node._mark) == []
    assert node._guard is None
    assert node._pipe is None
    assert not node.scratch.exists()


def test_folders_of_dead_launches_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.scratch.tempfile, "tempdir", str(tmp_path))
    mine = nodes.scratch.make()
    for name, old, new in (
        ("ardist-dead", f'"pid": {os.getpid()}', '"pid": 4194304'),
        ("ardist-reused", '"since": ', '"since": 1'),
        ("ardist-elsewhere", '"machine": "', '"machine": "another '),
        ("ardist-odd", "{", ""),
    ):
        (tmp_path / name).mkdir()
        text = (mine / nodes.scratch.OWNER).read_text()
        assert old in text
        (tmp_path / name / nodes.scratch.OWNER).write_text(text.replace(old, new))
    (tmp_path / "ardist-other").mkdir()
    another = nodes.scratch.make()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {mine.name, another.name, "ardist-elsewhere", "ardist-odd", "ardist-other"}
