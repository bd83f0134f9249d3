"""``report.html`` of a training run: curves, loss by frame, events."""

from __future__ import annotations

import json
from pathlib import Path

from ardist.errors import DataError
from ardist.report.ar_vae import add_ar_vae
from ardist.report.curves import draw_curves
from ardist.report.denoiser import add_denoiser
from ardist.report.html import Page
from ardist.report.launches import add_launches
from ardist.report.metrics import Record, read_metrics, series

_PLOTS = (
    ("loss", "Loss", ("train", "validation")),
    ("grad_norm", "Gradient norm before clipping", ("train",)),
    ("lr", "Learning rate", ("train",)),
    ("clips_per_second", "Clips per second over all ranks", ("train",)),
)


def write_run_report(run_dir: Path) -> Path:
    """Draw `run_dir` as one self-contained page and return its path; raises `DataError` for what is no run."""
    records = read_metrics(run_dir)
    figures = run_dir / "figures"
    figures.mkdir(exist_ok=True)
    page = Page(f"run {run_dir.resolve().name}", _subtitle(records))
    page.heading("Curves")
    for name, title, kinds in _PLOTS:
        curves = {kind: series(records, name, kind) for kind in kinds}
        drawn = {kind: curve for kind, curve in curves.items() if curve[0]}
        if drawn:
            figure = figures / f"{name}.png"
            draw_curves(figure, drawn, x_label="optimiser step", y_label=name)
            page.picture(figure, title)
    _loss_by_frame(records, figures, page)
    add_denoiser(records, run_dir, figures, page)
    add_ar_vae(records, run_dir, figures, page)
    _summary(run_dir, page)
    out = run_dir / "report.html"
    page.write(out)
    return out


def _subtitle(records: list[Record]) -> str:
    return f"{len(records)} records up to step {records[-1]['step']}" if records else "no step was logged yet"


def _loss_by_frame(records: list[Record], figures: Path, page: Page) -> None:
    validations = [record for record in records if record.get("loss_per_frame") and record.get("kind") == "validation"]
    if not validations:
        return
    chosen = {f"step {record['step']}": record for record in (validations[0], validations[-1])}
    curves = {name: (range(len(record["loss_per_frame"])), record["loss_per_frame"]) for name, record in chosen.items()}
    figure = figures / "loss-by-frame.png"
    draw_curves(figure, curves, x_label="frame", y_label="held-out loss")
    page.picture(figure, "Held-out loss by frame, at the first validation and at the last")


def _summary(run_dir: Path, page: Page) -> None:
    path = run_dir / "summary.json"
    if not path.exists():
        page.text("The run has not written its summary yet.")
        return
    try:
        summary = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{str(path)!r} is damaged: {error}") from None
    recorded = dict(summary.pop("events", {}))
    page.heading("Events")
    if recorded:
        page.table(("event", "count"), sorted(recorded.items()))
    else:
        page.text("None: nothing was skipped, retried, substituted or dropped.")
    add_launches(run_dir, summary.pop("launches", None), page)
    page.heading("Summary")
    page.table(("", ""), [(name, value) for name, value in summary.items() if not isinstance(value, dict | list)])
