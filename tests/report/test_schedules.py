"""Schedule tables hold the schedule's numbers; figures have the size, the colours and the edges they should have."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ardist.diffusion.ad import ADSchedule
from ardist.report.schedules import draw_ad_schedule, draw_timestep_laws, schedule_table


def text_of(schedule: ADSchedule) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(schedule_table(schedule))
    return console.file.getvalue()


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"│ {name} "))


def test_table_of_the_reference_shape() -> None:
    text = text_of(ADSchedule(16, 50, 50))
    assert "F=16, S=50, s=50: 800 rows" in text
    assert "│      800 │ network calls" in row_of(text, "rows")
    assert "│      815 │ 1.02x the 800" in row_of(text, "frame evaluations")
    assert "│   12,800 │ 15.71x" in row_of(text, "  without a cache")
    assert "│  50 rows │ 50 frame evaluations; then one frame every 50 rows" in row_of(text, "time to the first frame")
    assert row_of(text, "active frames per row").split("│")[2].strip() == "1"
    assert "given frames" not in text


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ADSchedule(16, 50, 0), "all frames together"),
        (ADSchedule(16, 50, 1), "then one frame in every row"),
        (ADSchedule(1, 50, 5), "the only frame"),
        (ADSchedule(16, 50, 5, num_prefix_frames=4), "given frames"),
        (ADSchedule(40, 50, 5, window=16, window_kind="recompute"), "W=16 (recompute)"),
    ],
)
def test_table_says_how_frames_arrive(schedule: ADSchedule, expected: str) -> None:
    assert expected in text_of(schedule)


def test_a_recompute_schedule_is_not_compared_with_itself() -> None:
    text = text_of(ADSchedule(16, 50, 5, window_kind="recompute"))
    assert "without a cache" not in text
    assert "2,000" in row_of(text, "frame evaluations")


def test_calls_for_a_long_prefix_are_shown() -> None:
    text = text_of(ADSchedule(30, 50, 5, window=4, num_prefix_frames=12))
    assert "│        2 │ network calls for the prefix" in row_of(text, "before the first row")
    # Twelve given frames once each, then 1 active frame in five rows, 2 in five, ... 10 in five.
    assert f"{12 + 5 * sum(range(1, 11))} frame evaluations" in row_of(text, "time to the first frame")
    assert "before the first row" not in text_of(ADSchedule(30, 50, 5, window=4, num_prefix_frames=4))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share(image: np.ndarray, colour: str) -> float:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(image - rgb).max(axis=2) <= 2).mean())


def test_heat_map_shows_frames_that_wait_and_frames_that_are_final(tmp_path: Path) -> None:
    draw_ad_schedule(ADSchedule(16, 50, 50), tmp_path / "late.png")
    draw_ad_schedule(ADSchedule(16, 50, 0), tmp_path / "together.png")
    one_by_one, together = pixels(tmp_path / "late.png"), pixels(tmp_path / "together.png")
    assert share(one_by_one, "#eef3ee") > 0.2
    assert share(one_by_one, "#d9d9dd") > 0.2
    assert share(together, "#eef3ee") < 0.01
    assert share(together, "#d9d9dd") < 0.01


def test_window_is_outlined_only_where_it_hides_frames(tmp_path: Path) -> None:
    draw_ad_schedule(ADSchedule(24, 50, 10, window=8), tmp_path / "window.png")
    draw_ad_schedule(ADSchedule(24, 50, 10, window=24), tmp_path / "whole.png")
    assert share(pixels(tmp_path / "window.png"), "#c0392b") > 1e-3
    assert share(pixels(tmp_path / "whole.png"), "#c0392b") == 0


def test_long_schedules_stay_small(tmp_path: Path) -> None:
    draw_ad_schedule(ADSchedule(300, 50, 50, window=16), tmp_path / "new" / "long.png")
    assert (tmp_path / "new" / "long.png").stat().st_size < 500_000


def test_laws_are_drawn_side_by_side(tmp_path: Path) -> None:
    draw_timestep_laws(tmp_path / "one.png", num_frames=4, num_timesteps=50, laws=["fopp"])
    draw_timestep_laws(tmp_path / "three.png", 1, 10, ["fopp", "independent", {"fopp": 4, "synchronous": 1}])
    one, three = pixels(tmp_path / "one.png"), pixels(tmp_path / "three.png")
    assert one.shape[0] == three.shape[0]
    assert three.shape[1] > 2 * one.shape[1]
    assert share(one, "#ffffff") < 0.95
