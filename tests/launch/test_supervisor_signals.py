"""Signals to a supervised job, to one of its ranks or to its supervisor: it is done, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_jobs import Job, once_under_way, wait_for

from ardist.config.launch import LaunchConfig
from ardist.launch import processes, supervisor
from ardist.launch.nodes import State
from ardist.launch.watchdog import Failure
from ardist.training import goodput
from ardist.training.heartbeat import Beat, Phase, read_beats

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("all_stacks")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_supervisor_saves_and_ends_with_75(tmp_path: Path, number: int) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:  # as nohup leaves SIGHUP, which the supervisor respects
        signal.signal(number, signal.SIG_DFL)
    job = Job(tmp_path, steps=1000, seconds=0.02)
    once_under_way(job, lambda: os.kill(os.getpid(), number))
    assert job.run() == 75
    saved = int((tmp_path / "saved").read_text())
    assert saved == job.history[-1] > 0
    assert goodput.read(tmp_path)[-1]["cause"] == "preempted"


def test_a_signal_to_one_rank_is_no_failure(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=1000, seconds=0.02)
    once_under_way(job, lambda: os.kill(read_beats(job.nodes[-1].scratch)[1].pid, signal.SIGTERM))
    assert job.run() == 75
    assert job.rows == []


def test_a_rank_that_leaves_before_all_have_met_does_not_keep_the_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LEAVING_SECONDS", 0.5)
    job = Job(tmp_path)
    job.fault(0, 0, "exit75")  # the other rank waits for it in its first step, which never ends
    assert job.run() == 75


def test_a_failure_after_a_signal_is_not_called_saved(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=1000, seconds=0.02)

    def ask_and_kill() -> None:
        rank = read_beats(job.nodes[-1].scratch)[1].pid
        os.kill(rank, signal.SIGSTOP)  # so that it cannot save before it dies
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: job.supervisor._forwarded == 1)
        os.kill(rank, signal.SIGKILL)

    once_under_way(job, ask_and_kill)
    assert job.run() == 4
    assert goodput.read(tmp_path)[-1]["cause"] == "died"
    assert len(job.nodes) == 1, "it was asked to stop, so it is not started again"


def test_a_signal_that_was_passed_on_promises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not stand yet finish no step and save nothing."""
    watching = supervisor.Supervisor(LaunchConfig(), tmp_path, lambda attempt, job: [])
    watching._signals.append((signal.SIGTERM, 0.0))
    said: list[str] = []
    monkeypatch.setattr(supervisor._log, "info", lambda text, *words: said.append(text % words))
    assert watching._forward([]) is None
    assert said == ["SIGTERM was passed on"]


class Elsewhere:
    """A machine whose rank gets on until it is cut off, which `when` says."""

    name, ranks, watched = "elsewhere", 1, 1

    def __init__(self, when: Callable[[], bool]) -> None:
        self.when = when

    def state(self) -> State:
        now = time.monotonic()
        beat = Beat(9, 1, 0.0, self.name, now, 1, now, 1000, 0, Phase.STEP, None, 0.0, "")
        return State([], Failure("cut off", "gone", host=self.name)) if self.when() else State([beat])

    def send_signal(self, number: int) -> None:
        pass

    def stacks(self) -> dict[str, str]:
        return {}

    def kill(self) -> None:
        pass


@pytest.mark.parametrize("grace", [60.0, 0.05])
def test_a_connection_that_ends_with_the_job_does_not_keep_the_rest_from_saving(tmp_path: Path, grace: float) -> None:
    job = Job(tmp_path, steps=1000, seconds=0.2, grace_seconds=grace)
    start = job.supervisor._start
    elsewhere = Elsewhere(lambda: bool(job.supervisor._signals))
    job.supervisor._start = lambda attempt, name: [*start(attempt, name), elsewhere]
    once_under_way(job, lambda: os.kill(os.getpid(), signal.SIGTERM), steps=2)
    assert job.run() == (75 if grace > 1 else 4), "it is waited for a while only"
    if grace > 1:
        assert int((tmp_path / "saved").read_text()) == job.history[-1]


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=1000, seconds=0.02)
    job.fault(0, 5, "SIGSTOP")

    def ask_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        # A second signal within two seconds counts as an echo of the first.
        wait_for(lambda: job.supervisor._signals and time.monotonic() - job.supervisor._signals[0][1] > 2)
        os.kill(os.getpid(), signal.SIGTERM)

    once_under_way(job, ask_twice, steps=4)
    assert job.run() == 128 + signal.SIGTERM, "not as what a limit ended"


def test_a_killed_supervisor_leaves_no_orphan_not_even_a_stopped_one(tmp_path: Path) -> None:
    (tmp_path / "fault-1").write_text("5 SIGSTOP")
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from toy_jobs import QUICK, Job, once_under_way, rearm, wait_for
limits = dict.fromkeys(("heartbeat_seconds", "data_seconds", "step_seconds"), 300)
job = Job(Path({str(tmp_path)!r}), steps=1000, grace_seconds=1, **limits)
start = job.supervisor._start
def told(*words):
    nodes = start(*words)
    print(nodes[0]._mark, flush=True)
    return nodes
job.supervisor._start = told
job.run()
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    mark = supervisor.stdout.readline().strip()
    wait_for(lambda: (tmp_path / "history").exists() and not (tmp_path / "fault-1").exists())
    assert len(processes.members(mark)) == 2
    supervisor.kill()
    supervisor.wait()
    wait_for(lambda: processes.members(mark) == [])
