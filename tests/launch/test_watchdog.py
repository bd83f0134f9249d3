"""The watchdog's judgement on made-up beats, with a clock of the test's own; the heartbeat file; the restart policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ardist.config.launch import LaunchConfig
from ardist.launch.nodes import State
from ardist.launch.policy import RestartPolicy
from ardist.launch.watchdog import Failure, Watchdog
from ardist.launch.wire import pack_state, unpack_state
from ardist.training.heartbeat import Beat, Heartbeat, Phase, read_beats

LIMITS = LaunchConfig(heartbeat_seconds=10, step_seconds=100, data_seconds=200, other_seconds=400)


def beat(rank: int, **changes: Any) -> Beat:
    values: dict[str, Any] = {
        "rank": rank, "pid": 1, "created": 0.0, "host": "a", "beat": 1000.0, "progress": 5, "progress_time": 1000.0,
        "step": 7, "first_step": 3, "phase": Phase.STEP, "exit_code": None, "ended": 0.0, "message": "",
    }  # fmt: skip
    return Beat(**{**values, **changes})


def watchdog(now: float, began: float = 990.0) -> Watchdog:
    """One that was made at `began`; it is `now`."""
    times = [now, began]
    return Watchdog(LIMITS, clock=lambda: times.pop() if len(times) > 1 else now)


def look(now: float, *beats: Beat, ranks: int = 0) -> Failure | None:
    return watchdog(now).look(beats, ranks)


def test_ranks_that_get_on_are_left_alone() -> None:
    assert look(1009, beat(0), beat(1)) is None
    assert look(5000, beat(0, beat=4999, progress_time=4999), beat(1, beat=4999, progress_time=1.0)) is None
    assert look(5000, beat(0, exit_code=0), beat(1, exit_code=75), ranks=2) is None, "who has ended need not beat"


def test_ranks_that_never_beat_have_the_time_of_a_start() -> None:
    assert look(1389, ranks=2) is None
    failure = look(1391, ranks=2)
    assert failure is not None
    assert failure.cause == "start"
    assert "2 of 2 ranks were not heard of within 401.0 s" in failure.detail
    # One that came and waits for the other is not to blame, nor one that has ended.
    waiting = beat(0, beat=1391.0, progress_time=1391.0, phase=Phase.START, first_step=None)
    for other in (waiting, beat(0, exit_code=75)):
        failure = look(1391, other, ranks=2)
        assert failure is not None
        assert "1 of 2 ranks" in failure.detail


def test_ranks_that_said_their_last_word_must_be_gone_a_minute_later() -> None:
    done = [beat(0, exit_code=0, ended=1000.0), beat(1, exit_code=0, ended=1100.0)]
    assert watchdog(1159).overdue(done, 2) is None
    assert watchdog(1161).overdue(done, 2) == 0
    assert watchdog(1161).overdue([done[0], beat(1, exit_code=75, ended=1100.0)], 2) == 75
    assert watchdog(1161).overdue(done, 3) is None, "another has not been heard yet"
    assert watchdog(1161).overdue([done[0], beat(1)], 1) is None, "another still runs"
    assert watchdog(1161).overdue([], 0) is None


def test_a_rank_without_beats_is_stopped_whatever_the_others_do() -> None:
    failure = look(1011, beat(0, beat=1010.9, progress_time=1010.9), beat(1))
    assert failure is not None
    assert (failure.cause, failure.rank, failure.step) == ("stopped", 1, 7)
    assert failure.seconds == pytest.approx(11)


def test_the_rank_furthest_behind_is_to_blame_and_its_phase_decides() -> None:
    alive = {"beat": 1150.0}
    failure = look(1150, beat(0, progress=6, **alive), beat(1, **alive))
    assert failure is not None
    assert (failure.cause, failure.rank, failure.phase) == ("stuck", 1, "in a step")
    # The one that is waited for waits for data itself: storage has more time than a step.
    waiting = beat(1, phase=Phase.DATA, **alive)
    assert look(1150, beat(0, progress=6, **alive), waiting) is None
    late = dataclasses.replace(waiting, beat=1250.0)
    failure = look(1250, beat(0, progress=6, beat=1250.0), late)
    assert failure is not None
    assert failure.phase == "waiting for data"


def test_ranks_at_the_same_point_are_all_named() -> None:
    failure = look(1150, beat(0, beat=1150.0), beat(1, beat=1150.0))
    assert failure is not None
    assert failure.rank is None
    assert "ranks 0, 1 made no progress" in failure.detail


@pytest.mark.parametrize("changes", [{"phase": Phase.START, "first_step": None}, {"phase": Phase.OTHER}, {"step": 3}])
def test_start_validation_and_the_first_step_have_more_time(changes: dict[str, Any]) -> None:
    assert look(1399, beat(0, beat=1399.0, **changes)) is None
    assert look(1401, beat(0, beat=1401.0, **changes)) is not None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    heart = Heartbeat()
    heart.stepped(1)  # before the start it is kept to itself
    heart.start(tmp_path, 3)
    [told] = read_beats(tmp_path)
    assert (told.rank, told.step, told.first_step, told.exit_code, told.phase) == (3, 0, None, None, Phase.START)
    assert told.alive
    heart.resumed(40)
    with heart.phase(Phase.DATA):
        assert read_beats(tmp_path)[0].phase is Phase.DATA
    heart.stepped(41)
    [later] = read_beats(tmp_path)
    assert (later.step, later.first_step, later.phase) == (41, 40, Phase.STEP)
    assert later.progress > told.progress
    heart.end(3, "ü" * 3000)
    [last] = read_beats(tmp_path)
    assert last.exit_code == 3
    assert last.message.endswith("üü"), "the tail of a message is kept"
    assert not dataclasses.replace(last, created=1.0).alive, "a reused process id is another process"


def test_states_travel_as_ages() -> None:
    state = State([beat(2, phase=Phase.DATA)], Failure("died", "x", rank=2), None)
    back = unpack_state(pack_state(state))
    assert back.failure == state.failure
    assert back.beats[0].beat == pytest.approx(1000.0, abs=1)
    assert back.beats[0].phase is Phase.DATA


def test_restarts_without_a_checkpoint_are_counted_and_pauses_grow() -> None:
    policy = RestartPolicy(LaunchConfig(max_restarts=3, restart_pause_seconds=20))
    died = Failure("died", "x")
    assert [policy.decide(died, resumed=0, steps=2).pause for _ in range(3)] == [20, 40, 60]
    assert "max_restarts=3" in str(policy.decide(died, resumed=0, steps=2).problem)
    policy = RestartPolicy(LaunchConfig(max_restarts=1))
    for resumed in range(5):
        assert policy.decide(died, resumed=resumed, steps=2).problem is None, "a checkpoint came in between"


def test_the_same_error_twice_before_any_step_ends_it() -> None:
    policy = RestartPolicy(LaunchConfig())
    error = Failure("error", "no such kernel", exit_code=4)
    assert policy.decide(error, resumed=None, steps=0).problem is None
    assert "twice in the same way" in str(policy.decide(error, resumed=None, steps=0).problem)
