"""The closed form of the AD schedule against a literal walk through the rows."""

from __future__ import annotations

import random
from typing import Any

import jaxtyping
import pytest
import torch

from ardist.diffusion.ad import ADSchedule
from ardist.errors import InvalidValueError


def legal_arguments(count: int) -> list[dict]:
    """Random schedules, the ends s=0 and s=S among them."""
    choose, found = random.Random(0), []
    while len(found) < count:
        total = choose.choice((12, 60, 100, 1000))
        steps = choose.choice([s for s in range(1, min(total // 2, 60) + 1) if total % s == 0])
        frames = choose.randint(1, 16)
        window = choose.choice((None, choose.randint(1, 20)))
        kind = choose.choice(("rolling", "recompute"))
        given = choose.choice((0, choose.randint(0, frames - 1)))
        slides = kind == "recompute" and window is not None and window < frames - given
        lowest = -(-steps // window) if slides else 0
        found.append(
            {
                "num_frames": frames,
                "num_steps": steps,
                "difference": choose.choice((lowest, steps, choose.randint(lowest, steps))),
                "window": window,
                "window_kind": kind,
                "num_timesteps": total,
                "num_prefix_frames": given,
            }
        )
    return found


def walk(num_frames: int, num_steps: int, difference: int, num_prefix_frames: int, **_) -> list[list[int]]:
    """Evaluations done after each row: a frame starts once its predecessor has `difference` of them."""
    done = [num_steps] * num_prefix_frames + [0] * (num_frames - num_prefix_frames)
    rows = [done]
    while done[-1] < num_steps:
        before, done = done, list(done)
        for frame in range(num_prefix_frames, num_frames):
            first = frame == num_prefix_frames
            may_start = first or before[frame] > 0 or before[frame - 1] >= difference
            if may_start and before[frame] < num_steps:
                done[frame] += 1
        rows.append(done)
    return rows


@pytest.mark.parametrize("arguments", legal_arguments(300), ids=lambda a: "-".join(map(str, a.values())))
def test_closed_form_is_the_literal_walk(arguments: dict) -> None:
    schedule, rows = ADSchedule(**arguments), walk(**arguments)
    frames, steps, total = schedule.num_frames, schedule.num_steps, schedule.num_timesteps
    assert schedule.num_rows == len(rows) - 1
    assert schedule.steps_done(0).tolist() == rows[0]
    shown_before_start, spacing = total - 1, total // steps
    levels = [shown_before_start] + [1 + spacing * k for k in reversed(range(steps))]
    window = frames if schedule.window is None else min(schedule.window, frames)
    cached: set[int] = set()
    calls = 0
    # A rolling window takes a long prefix in pieces of its own size, the last of them together with the first row.
    while schedule.window_kind == "rolling" and schedule.num_prefix_frames - len(cached) > window:
        assert schedule.prefix_ranges[calls] == (len(cached), len(cached) + window)
        cached |= set(range(*schedule.prefix_ranges[calls]))
        calls += 1
    assert schedule.num_network_calls == calls + schedule.num_rows
    evaluations, most_active = len(cached), 0
    for row in range(1, len(rows)):
        before, after = rows[row - 1], rows[row]
        active = [frame for frame in range(frames) if after[frame] > before[frame]]
        assert schedule.steps_done(row).tolist() == after
        assert [frame for frame, on in enumerate(schedule.updated(row).tolist()) if on] == active
        assert list(range(*schedule.active_range(row))) == active
        most_active = max(most_active, len(active))

        shown = schedule.timesteps(row).tolist()
        assert shown == [levels[k] for k in after]
        assert shown == sorted(shown)
        reached = schedule.next_timesteps(row).tolist()
        for frame in active:
            assert reached[frame] == (levels[after[frame] + 1] if after[frame] < steps else 0)

        started = sum(k > 0 for k in after)
        if schedule.window_kind == "rolling":
            # Final frames enter the cache as soon as they are final; everything else must be an active frame.
            evaluated = sorted({f for f in range(frames) if before[f] == steps} - cached | set(active))
            cached |= {f for f in range(frames) if before[f] == steps}
            seen = range(max(0, evaluated[0] - window + 1), started)
        else:
            end = min(max(started, window), frames)
            seen = evaluated = list(range(end - window, end))
            assert set(active) <= set(evaluated), "a frame left the window before it was final"
        assert list(range(*schedule.evaluated_range(row))) == evaluated
        assert list(range(*schedule.window_range(row))) == list(seen)
        evaluations += len(evaluated)
    assert schedule.num_frame_evaluations == evaluations
    assert schedule.max_active_frames == most_active
    for frame in range(frames):
        assert schedule.finish_row(frame) == next(row for row, done in enumerate(rows) if done[frame] == steps)
    assert schedule.first_frame_row == schedule.finish_row(schedule.num_prefix_frames)


def test_sizes_named_in_the_paper() -> None:
    rows = {s: ADSchedule(16, 50, s).num_rows for s in (0, 5, 10, 25, 50)}
    assert rows == {0: 50, 5: 125, 10: 200, 25: 425, 50: 800}
    assert ADSchedule(128, 50, 5, 16).num_rows == 685
    # The whole window in every row, as in the authors' code, against the active frames and one cache write per frame.
    assert ADSchedule(16, 50, 50, window_kind="recompute").num_frame_evaluations == 12_800
    assert ADSchedule(16, 50, 50).num_frame_evaluations == 16 * 51 - 1  # nothing attends to the last frame's cache
    assert ADSchedule(16, 50, 0).num_frame_evaluations == 16 * 50
    assert ADSchedule(16, 50, 5, num_prefix_frames=4).num_frame_evaluations == 4 + 12 * 51 - 1
    assert ADSchedule(30, 50, 5, 4, num_prefix_frames=12).num_network_calls == 2 + 50 + 17 * 5
    assert ADSchedule(30, 50, 5, 4, num_prefix_frames=12).num_frame_evaluations == 12 + 18 * 51 - 1


def test_synchronous_schedule_is_one_level_per_row() -> None:
    schedule = ADSchedule(5, 50, 0)
    shown = torch.stack([schedule.timesteps(row) for row in range(1, 51)])
    assert torch.equal(shown, torch.arange(981, 0, -20).unsqueeze(1).expand(50, 5))


def test_fully_autoregressive_schedule_is_one_frame_at_a_time() -> None:
    schedule = ADSchedule(3, 4, 4, num_timesteps=8)
    shown = [schedule.timesteps(row).tolist() for row in range(1, 13)]
    assert shown[:4] == [[7, 7, 7], [5, 7, 7], [3, 7, 7], [1, 7, 7]]
    assert shown[4:8] == [[1, 7, 7], [1, 5, 7], [1, 3, 7], [1, 1, 7]]
    assert all(schedule.updated(row).sum() == 1 for row in range(1, 13))


def test_first_evaluation_and_last_level_of_the_reference_steps() -> None:
    schedule = ADSchedule(4, 50, 5)
    assert schedule.timesteps(1).tolist() == [981, 999, 999, 999]
    assert schedule.next_timesteps(1).tolist() == [961, 999, 999, 999]
    assert schedule.timesteps(50)[0] == schedule.finished_timestep == 1
    assert schedule.next_timesteps(50)[0] == 0
    assert schedule.timesteps(51)[0] == schedule.finished_timestep


def test_rows_of_the_recompute_window_slide() -> None:
    schedule = ADSchedule(40, 50, 4, window=16, window_kind="recompute")
    assert [schedule.window_range(row) for row in (1, 60, 64, 65, 69, 206)] == [
        (0, 16),
        (0, 16),
        (0, 16),
        (1, 17),
        (2, 18),
        (24, 40),
    ]


def test_tensors_are_made_on_the_given_device() -> None:
    schedule = ADSchedule(8, 10, 2)
    for make in (schedule.steps_done, schedule.updated, schedule.timesteps, schedule.next_timesteps):
        assert make(3, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_frames": 0}, r"num_frames=0 .* legal: 1 and more"),
        ({"num_steps": 30}, r"num_steps=30 must divide num_timesteps=1000 .* 20, 25, 40, 50, 100, 125, 200, 250, 500"),
        ({"num_steps": 1000}, "num_steps=1000"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"difference": -1}, r"difference=-1 .* legal: 0\.\.50"),
        ({"difference": 51}, r"difference=51 .* legal: 0\.\.50"),
        ({"window": 0}, "window=0"),
        ({"window_kind": "sliding"}, "legal: rolling, recompute"),
        ({"num_prefix_frames": 32}, r"num_prefix_frames=32 .* legal: 0\.\.31"),
        (
            {"window": 16, "window_kind": "recompute", "difference": 3},
            r"difference=3 is too small .* legal: 4\.\.50, or, with the strict mask, a rolling",
        ),
        ({"window": 16, "window_kind": "recompute", "difference": 60}, r"legal: 4\.\.50"),
        ({"window": 16, "window_kind": "recompute", "difference": 0}, r"legal: 4\.\.50"),
    ],
)
def test_illegal_schedules_name_the_legal_values(arguments: dict, match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        ADSchedule(**{"num_frames": 32, "num_steps": 50, "difference": 5, **arguments})


def test_smallest_legal_difference_is_accepted_and_windows_may_be_longer_than_the_video() -> None:
    assert ADSchedule(32, 50, 4, window=16, window_kind="recompute").num_rows == 50 + 31 * 4
    assert ADSchedule(8, 50, 0, window=16, window_kind="recompute").num_frame_evaluations == 8 * 50
    assert ADSchedule(32, 50, 0, window=16).max_active_frames == 32


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_frames": 4.5}, r"num_frames=4\.5 .* legal: an integer"),
        ({"num_steps": 50.0}, r"num_steps=50\.0 .* legal: an integer"),
        ({"difference": True}, "difference=True .* legal: an integer"),
        ({"window": "16"}, "window='16' .* legal: an integer"),
    ],
)
def test_sizes_that_are_no_integers_are_refused(
    arguments: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the type annotations, which these tests check at run time and the product does not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidValueError, match=match):
        ADSchedule(**{"num_frames": 32, "num_steps": 50, "difference": 5, **arguments})


def test_given_frames_may_leave_a_recompute_window() -> None:
    """20 frames through a window of 16 need s >= 4, but not when 4 of them are given: the other 16 fit."""
    with pytest.raises(InvalidValueError, match=r"legal: 4\.\.50"):
        ADSchedule(20, 50, 0, window=16, window_kind="recompute", num_prefix_frames=3)
    schedule = ADSchedule(20, 50, 0, window=16, window_kind="recompute", num_prefix_frames=4)
    assert {schedule.window_range(row) for row in range(1, 51)} == {(4, 20)}


@pytest.mark.parametrize("row", [2.5, 3.0, True])
def test_a_row_that_is_no_integer_is_refused(row: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame cannot have had one and a half evaluations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in (ADSchedule(2, 50, 5).steps_done, ADSchedule(2, 50, 5).active_range):
        with pytest.raises(InvalidValueError, match=rf"row={row} is illegal; legal: an integer"):
            call(row)  # type: ignore[operator]


@pytest.mark.parametrize("row", [-1, 56])
def test_rows_out_of_range_are_refused(row: int) -> None:
    with pytest.raises(InvalidValueError, match=rf"row={row} is out of range; legal: 0\.\.55"):
        ADSchedule(2, 50, 5).steps_done(row)
    with pytest.raises(InvalidValueError, match=r"legal: 1\.\.55"):
        ADSchedule(2, 50, 5).active_range(0)
