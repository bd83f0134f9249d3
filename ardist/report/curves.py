"""Curves of a run as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
_COLOURS = ("#2463a8", "#d1741f", "#3a8a4d", "#8a4fa3", "#b03a48")


def draw_curves(
    path: Path,
    curves: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> None:
    """Draw named curves with optional horizontal reference levels, labelled where they end."""
    figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, (steps, values)), colour in zip(curves.items(), _COLOURS * 4, strict=False):
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, values, label=name, color=colour, linewidth=1.6, marker=marker, markersize=3)
    for name, level in (levels or {}).items():
        axes.axhline(level, color="#888888", linewidth=1, linestyle="--")
        axes.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="#666666"
        )
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if logarithmic else "linear")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
