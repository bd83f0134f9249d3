"""The report: metrics survive a torn last line and a resume, pages are self-contained and escaped."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ardist.errors import DataError
from ardist.report.curves import draw_curves
from ardist.report.denoiser import draw_loss_map
from ardist.report.html import Page
from ardist.report.metrics import read_metrics, series
from ardist.report.run_report import write_run_report
from ardist.training import goodput


def write_metrics(run: Path, records: list[dict[str, object]], tail: str = "") -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(text + tail, encoding="utf-8")


def test_the_later_record_of_a_step_wins_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, [{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.5}], '{"step": 3,'
    )
    records = read_metrics(tmp_path)
    assert series(records, "loss") == ([1, 2], [4.0, 2.5])


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    record = {"step": 1, "loss": 4.0, "note": "one\u2028two\x85three"}
    write_metrics(tmp_path, [], json.dumps(record, ensure_ascii=False) + "\n")
    assert read_metrics(tmp_path) == [record]
    line = {"event": "end", "job": "a\u2028b", "attempt": 0, "time": 1.0}
    (tmp_path / goodput.FILE).write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert goodput.read(tmp_path) == [line]


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


def test_failures_and_what_they_cost_are_shown(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "loss": 1.0}])
    common = {"job": "a", "time": 100.0}
    failure = {"cause": "stuck", "detail": "no step for 6 s", "rank": 1, "phase": "step", "step": 7, "failed": 30.0}
    book: list[dict[str, object]] = [
        {**common, "event": "end", "attempt": 0, "began": 0.0, "ended": 31.0, "detect_seconds": 6.05, **failure},
        {**common, "event": "first_step", "attempt": 1, "at": 39.5, "resumed_step": 5},
        {**common, "event": "end", "attempt": 1, "began": 31.0, "ended": 60.0, "cause": "done"},
    ]
    (tmp_path / goodput.FILE).write_text("".join(json.dumps(record) + "\n" for record in book))
    totals = goodput.summarise(tmp_path, useful_seconds=45.0)
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 8, "launches": totals}))
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    for shown in ("Starts and failures", "goodput", "0.75", "stuck", "no step for 6 s", "6.05", "9.5"):
        assert f">{shown}<" in text, shown


def test_the_loss_map_and_the_newest_samples_are_shown(tmp_path: Path) -> None:
    table: list[list[float | None]] = [[0.1, 0.2, None], [0.3, None, 0.9]]
    records: list[dict[str, object]] = [
        {"step": 4, "kind": "validation", "loss": 1.0, "loss_per_frame_and_timestep": table},
    ]
    for step in (4, 8):
        media = {}
        for name in ("s00-video-00", "s05-video-00", "s05-video-01"):
            path = tmp_path / "samples" / f"{name}-{step}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"{name} at {step}".encode())
            media[name] = str(path.relative_to(tmp_path))
        records.append({"step": step, "kind": "samples", "videos": 3, "media": media})
    (tmp_path / "samples" / "s05-video-01-8.mp4").unlink()
    write_metrics(tmp_path, records)
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    videos = [base64.b64decode(found).decode() for found in re.findall(r"data:video/mp4;base64,([^\"]+)", text)]
    assert videos == ["s00-video-00 at 8", "s05-video-00 at 8"], "the newest, and only what is there"
    assert "s = 0, all frames together" in text
    assert "s = 5" in text
    image = np.asarray(Image.open(tmp_path / "figures" / "loss-map.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 4, "four values, white and the axes"


def test_a_missing_value_of_the_loss_map_is_white(tmp_path: Path) -> None:
    draw_loss_map(tmp_path / "full.png", [[1.0, 2.0]])
    draw_loss_map(tmp_path / "half.png", [[1.0, None]])
    full, half = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("full.png", "half.png"))
    assert (half > 250).mean() > (full > 250).mean() + 0.2
