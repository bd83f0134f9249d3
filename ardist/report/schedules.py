"""Sampling schedules and timestep laws as a terminal table and as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from ardist.diffusion.ad import ADSchedule
from ardist.diffusion.fopp import LAWS, sample_timesteps

_NOISE = colormaps["viridis_r"]
_FINAL, _WAITING, _INK, _MUTED = "#eef3ee", "#d9d9dd", "#222222", "#777777"
_BLUE, _ORANGE, _RED = "#2463a8", "#d1741f", "#c0392b"
_CLIPS, _MAX_COLUMNS = 20_000, 1600


def schedule_table(schedule: ADSchedule) -> Table:
    """What one run of `schedule` costs and when its frames are ready, beside the same run without a cache."""
    rows, first = schedule.num_rows, schedule.first_frame_row
    evaluations, useful = schedule.num_frame_evaluations, schedule.num_generated_frames * schedule.num_steps
    window = min(schedule.num_frames, schedule.window or schedule.num_frames)
    ranges = (*schedule.prefix_ranges, *map(schedule.evaluated_range, range(1, first + 1)))
    until_first = sum(end - start for start, end in ranges)
    pace = {0: "all frames together", 1: "then one frame in every row"}.get(
        schedule.difference, f"then one frame every {schedule.difference} rows"
    )
    if schedule.num_generated_frames == 1:
        pace = "the only frame"

    table = Table(title=_title(schedule), title_justify="left", show_header=False)
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("note", style="dim")
    if schedule.num_prefix_frames:
        table.add_row("given frames", f"{schedule.num_prefix_frames:,}", "count as final from the start")
    if schedule.prefix_ranges:
        note = "network calls for the prefix, which is longer than the window"
        table.add_row("before the first row", f"{len(schedule.prefix_ranges):,}", note)
    table.add_row("rows", f"{rows:,}", "network calls; with guidance each is of twice the batch")
    table.add_row("active frames per row", f"{schedule.max_active_frames:,}", "at most")
    table.add_row("frame evaluations", f"{evaluations:,}", f"{evaluations / useful:.2f}x the {useful:,} that denoise")
    if schedule.window_kind == "rolling":
        table.add_row("  without a cache", f"{window * rows:,}", f"{window * rows / evaluations:.2f}x this schedule")
    table.add_row("time to the first frame", f"{first:,} rows", f"{until_first:,} frame evaluations; {pace}")
    table.add_row("time to the last frame", f"{rows:,} rows", "")
    return table


def draw_ad_schedule(schedule: ADSchedule, path: Path) -> None:
    """Heat map of `schedule` as a PNG: rows from left to right, frames downwards, the colour is the timestep."""
    frames, rows, top = schedule.num_frames, schedule.num_rows, schedule.num_timesteps - 1
    # A row of a long schedule is narrower than a pixel: as many are drawn as can be seen.
    numbers = np.unique(np.linspace(1, rows, min(rows, _MAX_COLUMNS)).round().astype(int)).tolist()
    timesteps = torch.stack([schedule.timesteps(row) for row in numbers], dim=1).numpy()
    updated = torch.stack([schedule.updated(row) for row in numbers], dim=1).numpy()
    final = torch.stack([schedule.steps_done(row) == schedule.num_steps for row in numbers], dim=1).numpy() & ~updated

    image = _NOISE(timesteps / top, bytes=True)
    for mask, colour in ((final, _FINAL), (~final & ~updated, _WAITING)):
        image[mask] = (255 * np.array(to_rgba(colour))).round()

    figure = Figure(figsize=(9.0, float(np.clip(1.9 + 0.17 * frames, 2.8, 7.5))), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0.5, rows + 0.5, frames - 0.5, -0.5))
    handles: list[Patch | Line2D] = [
        Patch(facecolor=_FINAL, edgecolor=_MUTED, linewidth=0.5, label="final"),
        Patch(facecolor=_WAITING, edgecolor=_MUTED, linewidth=0.5, label="not started"),
    ]
    if schedule.window is not None and schedule.window < frames:
        handles.append(_draw_window(axes, schedule, numbers))
    if schedule.difference and schedule.num_generated_frames > 1:
        axes.axvline(schedule.first_frame_row + 0.5, color=_INK, linewidth=0.9, linestyle=":")
        handles.append(Line2D([], [], color=_INK, linewidth=0.9, linestyle=":", label="first frame ready"))
    axes.set(xlabel="row (network call)", ylabel="frame")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=8))
    axes.set_title(_title(schedule), fontsize=10, loc="left", color=_INK)
    figure.colorbar(ScalarMappable(Normalize(0, top), _NOISE), ax=axes, label="timestep", pad=0.015)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8)
    _save(figure, path)


def draw_timestep_laws(
    path: Path,
    num_frames: int = 16,
    num_timesteps: int = 1000,
    laws: Sequence[str | Mapping[str, float]] = LAWS,
) -> None:
    """The laws of the training timesteps as a PNG, drawn from 20,000 clips each.

    Above, the timesteps of every frame (median, middle half, middle nine tenths, three clips); below, the density of
    all frames pooled.
    """
    figure = Figure(figsize=(2.75 * len(laws) + 0.6, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(laws), squeeze=False, height_ratios=(2, 1), sharey="row")
    clips = max(200, min(_CLIPS, 4_000_000 // num_frames))
    ids = torch.arange(clips)
    for law, above, below in zip(laws, panels[0], panels[1], strict=True):
        drawn = sample_timesteps(law, clips, num_frames, num_timesteps, seed=0, epoch=0, sample_ids=ids).numpy()
        _draw_bands(above, drawn, num_timesteps)
        above.set_title(_law_name(law), fontsize=9, loc="left", color=_INK)
        bins = min(50, num_timesteps)
        heights, edges = np.histogram(drawn, bins=bins, range=(0, num_timesteps))
        below.stairs(heights / drawn.size * bins, edges, fill=True, color=_BLUE, alpha=0.55)
        below.axhline(1, color=_MUTED, linewidth=0.8, linestyle="--")
        below.set(xlabel="timestep", xlim=(0, num_timesteps), ylim=(0, None))
        below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    panels[0, 0].set_ylabel("timestep")
    panels[1, 0].set_ylabel("pooled density\n(1 = uniform)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _draw_bands(axes: Axes, drawn: np.ndarray, num_timesteps: int) -> None:
    low, quarter, middle, three_quarters, high = np.quantile(drawn, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    frame = np.arange(drawn.shape[1])
    marker = "o" if len(frame) == 1 else None
    axes.fill_between(frame, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="90% of clips")
    axes.fill_between(frame, quarter, three_quarters, color=_BLUE, alpha=0.3, linewidth=0, label="50%")
    axes.plot(frame, middle, color=_BLUE, linewidth=1.6, marker=marker, label="median")
    for number, clip in enumerate(drawn[:3]):
        label = "single clips" if number == 0 else None
        axes.plot(frame, clip, color=_ORANGE, linewidth=0.8, marker=marker, alpha=0.9, label=label)
    axes.set(xlabel="frame", ylim=(-0.02 * num_timesteps, 1.02 * (num_timesteps - 1)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=5))


def _draw_window(axes: Axes, schedule: ADSchedule, rows: list[int]) -> Line2D:
    """The outline of the frames that the network sees in each row; returns its entry in the legend."""
    ranges = np.array([schedule.window_range(row) for row in rows], dtype=float)
    edges = np.array([*rows, schedule.num_rows + 1]) - 0.5
    for side in (0, 1):
        axes.stairs(ranges[:, side] - 0.5, edges, baseline=None, color=_RED, linewidth=1.1)
    return Line2D([], [], color=_RED, linewidth=1.1, label="seen by the network")


def _title(schedule: ADSchedule) -> str:
    parts = [f"F={schedule.num_frames}", f"S={schedule.num_steps}", f"s={schedule.difference}"]
    if schedule.window is not None:
        parts.append(f"W={schedule.window} ({schedule.window_kind})")
    return f"AD schedule, {', '.join(parts)}: {schedule.num_rows:,} rows"


def _law_name(law: str | Mapping[str, float]) -> str:
    if isinstance(law, str):
        return law
    total = sum(law.values())
    return ", ".join(f"{weight / total:.0%} {name}" for name, weight in law.items())


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
