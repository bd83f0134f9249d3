"""The restart loop over ranks without torch: every way to die or hang is noticed, told, cleaned up and healed."""

from __future__ import annotations

import errno
import json
import secrets
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from toy_jobs import QUICK, Job, rearm, wait_for

from ardist.config.launch import LaunchConfig
from ardist.errors import HardwareError
from ardist.events import events
from ardist.launch import engines, nodes, processes, supervisor, watchdog
from ardist.launch.engines import Host, Placement, launches
from ardist.launch.nodes import LocalNode
from ardist.launch.watchdog import Failure
from ardist.training import goodput
from ardist.training.heartbeat import Beat

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("all_stacks")


def test_without_a_fault_nothing_is_restarted(tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert job.run() == 0
    assert job.rows == []
    assert job.history == list(range(1, 13))


@pytest.mark.parametrize(
    ("what", "cause", "text"),
    [
        ("SIGKILL", "died", "was ended by SIGKILL"),
        ("segfault", "died", "was ended by SIGSEGV"),
        ("SIGABRT", "died", "was ended by SIGABRT"),
        ("SIGSTOP", "stopped", "gave no sign of life"),
        ("gil", "stopped", "gave no sign of life"),
        ("loop", "stuck", "made no progress"),
        ("raise", "error", "something unforeseen"),
        ("exit4", "error", "told to leave with 4"),
    ],
)
def test_every_way_to_fail_is_named_and_healed(tmp_path: Path, what: str, cause: str, text: str) -> None:
    job = Job(tmp_path, **(QUICK if cause in ("stopped", "stuck") else {}))
    job.fault(1, 7, what)
    assert job.run() == 0
    [row] = job.rows
    assert (row["cause"], row["rank"], row["step"]) == (cause, 1, 7)
    # A rank that stood still is woken to write its stacks and may save the step that it is in before it is killed.
    assert row["lost_steps"] in ((0, 1, 2) if cause == "stopped" else (2,))
    assert text in row["detail"]
    assert row["detect_seconds"] < 30, "long before the limit of what is not a step"
    assert row["restart_seconds"] is not None
    assert job.history == list(range(1, 13))
    if what not in ("SIGKILL", "raise", "exit4"):
        assert "toy_rank.py" in job.stacks(1), "where the rank was is on record"
    if cause != "died":
        assert "toy_rank.py" in job.stacks(0) or cause == "error", "and so is where its peers waited"


def test_a_rank_that_never_beats_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    job.fault(1, -1, "loop")

    class Late(watchdog.Watchdog):
        """The first attempt has lasted too long as soon as the other rank is heard."""

        def look(self, beats: Sequence[Beat], ranks: int) -> Failure | None:
            if beats and len(job.nodes) == 1:
                self._began = self._clock() - job.limits.other_seconds - 1
            return super().look(beats, ranks)

    monkeypatch.setattr(supervisor, "Watchdog", Late)
    assert job.run() == 0
    [row] = job.rows
    assert row["cause"] == "start"
    assert "1 of 2 ranks were not heard of" in row["detail"]
    assert job.history == list(range(1, 13))


def test_processes_that_stay_after_the_last_word_are_ended_and_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overdue = watchdog.Watchdog.overdue

    def once_it_stays(*words: Any) -> int | None:
        return None if (tmp_path / "fault-1").exists() else overdue(*words)

    monkeypatch.setattr(watchdog, "END_SECONDS", 0.5)
    monkeypatch.setattr(watchdog.Watchdog, "overdue", once_it_stays)
    job = Job(tmp_path)
    job.fault(1, 12, "loop")
    before = events.snapshot().get("launch.hung_at_end", 0)
    assert job.run() == 0
    assert events.snapshot()["launch.hung_at_end"] == before + 1
    assert len(job.nodes) == 1
    assert "take_fault" in job.stacks(1), "where it stayed is on record"


@pytest.mark.parametrize("silent", [1, 2])
def test_ranks_that_leave_without_a_word_are_not_done(tmp_path: Path, silent: int) -> None:
    job = Job(tmp_path, steps=0)
    for number in range(silent):
        rearm(job, lambda attempt, number=number: job.fault(number, -1, "leave"))  # type: ignore[misc]
    assert job.run() == 4
    assert len(job.nodes) == 2, "the same failure twice before the first step"


def test_restarts_are_bounded_where_no_checkpoint_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = Job(tmp_path, max_restarts=2)
    rearm(job, lambda attempt: job.fault(1, 3, "SIGKILL"))
    assert job.run() == 4
    assert len(job.rows) == 3
    assert all(row["step"] == 3 for row in job.rows)


def test_restarts_are_not_bounded_while_checkpoints_are_made(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=22, max_restarts=1)
    rearm(job, lambda attempt: job.fault(0, 6 * attempt, "SIGKILL") if attempt <= 3 else None)
    assert job.run() == 0
    assert [row["step"] for row in job.rows] == [6, 12, 18]
    assert [row["lost_steps"] for row in job.rows] == [1, 2, 3]


@pytest.mark.parametrize("code", [2, 3])
def test_bad_configuration_and_bad_data_are_not_tried_again(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path)
    job.fault(0, 4, f"exit{code}")
    assert job.run() == code
    assert len(job.rows) == 1


def test_an_error_at_the_start_is_not_tried_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.words = ["no_such_module"]
    assert job.run() == 1
    assert len(job.nodes) == 2


def test_machines_that_are_not_there_yet_are_waited_for(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.fault(1, 0, "SIGKILL")

    def away(attempt: int) -> None:
        if attempt in (2, 3, 4):
            raise HardwareError("1 of 2 machines are left; launch.min_nodes=2")

    rearm(job, away)
    assert job.run() == 0
    assert len(job.nodes) == 2, "started again as soon as they were there"
    assert job.history == list(range(1, 13))


def test_a_process_that_cannot_be_killed_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck:
        pid = 1

        def kill(self) -> None:
            pass

        def wait(self, timeout: float | None = None) -> int:
            assert timeout is not None, "without end"
            raise subprocess.TimeoutExpired("rank", timeout)

    monkeypatch.setattr(nodes, "KILL_SECONDS", 0.0)
    node = LocalNode("localhost", LaunchConfig())
    monkeypatch.setattr(node, "_processes", [Stuck(), Stuck()])
    before = events.snapshot().get("launch.not_killed", 0)
    node.kill()
    assert events.snapshot()["launch.not_killed"] == before + 2


@pytest.mark.parametrize("fault", [False, True])
def test_a_full_disk_costs_the_book_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    def full(*words: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(goodput, "append_line", full)
    monkeypatch.setattr(goodput, "write_atomically", full)
    (tmp_path / "summary.json").write_text("{}")
    line = {"event": "first_step", "job": "before", "attempt": 1, "at": 1.0, "time": 1.0, "resumed_step": 0}
    (tmp_path / goodput.FILE).write_text(json.dumps(line) + "\n")
    before = events.snapshot().get("launch.book_failed", 0)
    job = Job(tmp_path)
    if fault:
        job.fault(1, 7, "SIGKILL")
    assert job.run() == 0
    assert job.history == list(range(1, 13))
    assert len(job.nodes) == 1 + fault
    assert events.snapshot()["launch.book_failed"] == before + (5 if fault else 3)


def test_summary_has_the_cost_of_every_cause(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"useful_seconds": 0.2, "step": 12}))
    job = Job(tmp_path)
    job.fault(1, 7, "SIGKILL")
    assert job.run() == 0
    launches = json.loads((tmp_path / "summary.json").read_text())["launches"]
    assert (launches["restarts"], launches["launches"], launches["lost_steps"]) == (1, 1, 2)
    died = launches["by_cause"]["died"]
    assert (died["count"], died["lost_steps"]) == (1, 2)
    assert 0 < died["mean_detect_seconds"] < died["mean_restart_seconds"] < launches["wall_seconds"]
    assert launches["goodput"] == pytest.approx(0.2 / launches["wall_seconds"])


def test_ranks_of_a_machine_follow_each_other() -> None:
    placement = Placement((Host("a", 2), Host("b", 3)), 1, "a", 1)
    assert list(placement.ranks) == [2, 3, 4]
    assert placement.world_size == 5
    started = launches("plain", placement, ["m"], HERE)
    assert [launch.environment["LOCAL_RANK"] for launch in started] == ["0", "1", "2"]
    assert engines.ENGINES[0] == "deepspeed"


def test_the_marks_of_other_jobs_are_left_alone() -> None:
    mark = secrets.token_hex(8)
    child = subprocess.Popen(["sleep", "600"], env={processes.VARIABLE: mark})
    try:
        wait_for(lambda: processes.members(mark) == [child.pid])
        assert processes.kill(mark[:-1]) == []
        assert psutil.pid_exists(child.pid)
        assert processes.kill(mark) == []
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()


def test_a_killed_supervisor_does_not_count_as_running_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    first_step = {"event": "first_step", "attempt": 1, "resumed_step": 0, "ranks": 1}
    killed = {**first_step, "job": "a", "at": 5.0, "time": 1005.0}
    next_one = {**first_step, "job": "b", "at": 4.0, "time": 1034.0}
    ended = {"event": "end", "job": "b", "attempt": 1, "began": 0.0, "ended": 70.0, "cause": "done", "time": 1100.0}
    monkeypatch.setattr(goodput.time, "time", lambda: 1050.0)
    assert goodput.wall_seconds([killed]) == 50, "as far as anybody knows it still runs"
    assert goodput.wall_seconds([killed, next_one]) == 30 + 20, "it ended when the next one began, at 1030"
    assert goodput.wall_seconds([killed, next_one, ended]) == 30 + 70
