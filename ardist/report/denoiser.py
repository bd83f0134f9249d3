"""The part of a run's report that only a denoiser has: the loss by frame and timestep, the sampled videos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ardist.report.html import Page
from ardist.report.metrics import Record

VIDEOS_PER_DIFFERENCE = 4
"""A page that holds every video of a long run could not be opened."""


def add_denoiser(records: Sequence[Record], run_dir: Path, figures: Path, page: Page) -> None:
    """Add the loss map of the newest validation and the newest samples; nothing where there are none."""
    tables = [record for record in records if record.get("loss_per_frame_and_timestep")]
    if tables:
        figure = figures / "loss-map.png"
        draw_loss_map(figure, tables[-1]["loss_per_frame_and_timestep"])
        page.picture(figure, f"Held-out loss by frame and timestep at step {tables[-1]['step']}; white: nothing drawn")
    sampled = [record for record in records if record.get("kind") == "samples" and record.get("media")]
    if sampled:
        _samples(sampled[-1], run_dir, page)


def draw_loss_map(path: Path, table: Sequence[Sequence[float | None]]) -> None:
    """Heat map of a loss [frame][range of timesteps]; None is left white."""
    values = np.array([[np.nan if value is None else value for value in row] for row in table], dtype=float)
    frames, ranges = values.shape
    figure = Figure(figsize=(7.2, float(np.clip(1.6 + 0.16 * frames, 2.4, 6.0))), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        values, aspect="auto", interpolation="nearest", extent=(0, 1, frames - 0.5, -0.5), cmap="viridis"
    )
    axes.set(xlabel="timestep as a fraction of T (0: clean)", ylabel="frame")
    axes.set_xticks(np.linspace(0, 1, min(ranges, 10) + 1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    figure.colorbar(image, ax=axes, label="loss")
    figure.savefig(path)


def _samples(record: Record, run_dir: Path, page: Page) -> None:
    page.heading("Samples")
    by_difference: dict[int, list[tuple[Path, str]]] = {}
    for name, path in sorted(record["media"].items()):
        match = re.fullmatch(r"s(\d+)-video-(\d+)", name)
        if match and (run_dir / path).is_file():
            by_difference.setdefault(int(match[1]), []).append((run_dir / path, f"video {int(match[2])}"))
    page.text(f"Sampled with the averaged weights at step {record['step']}; s: frames behind each other, in steps.")
    for difference, videos in sorted(by_difference.items()):
        page.text(f"s = {difference}" + (", all frames together" if difference == 0 else ""))
        page.videos(videos[:VIDEOS_PER_DIFFERENCE])
