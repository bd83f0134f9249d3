"""The report: metrics survive a torn last line and a resume, pages are self-contained and escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ardist.errors import DataError
from ardist.report.curves import draw_curves
from ardist.report.html import Page
from ardist.report.metrics import read_metrics, series
from ardist.report.run_report import write_run_report


def write_metrics(run: Path, records: list[dict[str, object]], tail: str = "") -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(text + tail, encoding="utf-8")


def test_the_later_record_of_a_step_wins_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, [{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.5}], '{"step": 3,'
    )
    records = read_metrics(tmp_path)
    assert series(records, "loss") == ([1, 2], [4.0, 2.5])


def test_validation_records_stand_apart(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "loss": 4.0}, {"step": 1, "loss": 5.0, "kind": "validation"}])
    records = read_metrics(tmp_path)
    assert series(records, "loss") == ([1], [4.0])
    assert series(records, "loss", kind="validation") == ([1], [5.0])


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1}], "garbage\n")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match="no run directory"):
        read_metrics(tmp_path / "absent")


def test_page_is_self_contained_and_escapes(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    draw_curves(
        figure, {"a": ([1, 2], [1.0, 0.5]), "b": ([1, 2], [2.0, 1.0])}, x_label="x", y_label="y", levels={"l": 1}
    )
    assert Image.open(figure).size[0] > 500
    page = Page("<script>alert(1)</script>", "sub & title")
    page.picture(figure, 'caption "quoted"')
    page.table(["n", "v"], [["<b>", 1.23456], [True, 1000000]])
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "<b>" not in text
    assert "1.235" in text
    assert "1,000,000" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_run_report_names_events_and_draws_frames(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"step": n, "loss": 1 / n, "grad_norm": 1.0, "lr": 1e-3} for n in range(1, 9)]
    records += [{"step": n, "kind": "validation", "loss": 1.0, "loss_per_frame": [0.1, 0.2]} for n in (4, 8)]
    write_metrics(tmp_path, records)
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 8, "events": {"loader.substitution": 2}}))
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "loader.substitution" in text
    assert (tmp_path / "figures" / "loss-by-frame.png").exists()
