"""The book of a run over all its starts: what every failure cost, and how much of the time was useful.

The supervisor appends to ``launches.jsonl``; times in it are seconds since its own start on a monotonic clock, so that
a clock that is set back does no harm. Trainer, report and supervisor read it through `summarise`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ardist.training.run_dir import append_line, write_atomically

FILE = "launches.jsonl"
JOB_VARIABLE = "ARDIST_LAUNCH"
Record = dict[str, Any]


def note_first_step(run_dir: Path, job: str, attempt: int, *, at: float, resumed_step: int, ranks: int) -> None:
    """An attempt completed its first step `at` seconds after the job's start, having resumed after `resumed_step`."""
    _append(
        run_dir,
        {"event": "first_step", "job": job, "attempt": attempt, "at": at, "resumed_step": resumed_step}
        | {"ranks": ranks},
    )


def note_end(run_dir: Path, job: str, attempt: int, *, began: float, ended: float, cause: str, **details: Any) -> None:
    """An attempt ended: ``done``, ``preempted``, or a failure with its `failed`, `step`, `detect_seconds`."""
    record = {"event": "end", "job": job, "attempt": attempt, "began": began, "ended": ended, "cause": cause}
    _append(run_dir, record | details)


def _append(run_dir: Path, record: Record) -> None:
    append_line(run_dir / FILE, record | {"time": time.time()})


def read(run_dir: Path) -> list[Record]:
    """All records, oldest first; a line that a killed supervisor left unfinished is left out."""
    try:
        lines = (run_dir / FILE).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"event", "job", "attempt", "time"} <= record.keys():
            records.append(record)
    return records


def restarts(records: Iterable[Record]) -> list[Record]:
    """One row per failure: cause, step, detect_seconds, restart_seconds to the next completed step, lost_steps.

    The last two are None while no later attempt has completed a step.
    """
    rows: list[Record] = []
    waiting: list[tuple[Record, Record]] = []
    for record in records:
        if record["event"] == "end" and record["cause"] not in ("done", "preempted"):
            row = {name: record.get(name) for name in ("cause", "detail", "rank", "phase", "step", "detect_seconds")}
            rows.append(row | {"restart_seconds": None, "lost_steps": None})
            waiting.append((record, rows[-1]))
        elif record["event"] == "first_step":
            for end, row in waiting:
                if end["job"] == record["job"]:
                    row["restart_seconds"] = record["at"] - end["failed"]
                    # A failure before the first step lost what the one before it lost: counted there.
                    row["lost_steps"] = max(0, end["step"] - record["resumed_step"]) if end.get("step") else 0
            waiting = []
    return rows


def summarise(run_dir: Path, useful_seconds: float) -> Record | None:
    """Totals over all starts: wall_seconds, goodput, restarts, lost_steps and by_cause; None without a supervisor."""
    records = read(run_dir)
    if not records:
        return None
    rows = restarts(records)
    by_cause = {
        cause: _total([row for row in rows if row["cause"] == cause]) for cause in {row["cause"] for row in rows}
    }
    wall = wall_seconds(records)
    return {
        "wall_seconds": wall,
        "useful_seconds": useful_seconds,
        "goodput": min(1.0, useful_seconds / wall) if wall else None,
        "launches": len({record["job"] for record in records}),
        "restarts": len(rows),
        "lost_steps": sum(row["lost_steps"] or 0 for row in rows),
        "by_cause": dict(sorted(by_cause.items())),
    }


def wall_seconds(records: Iterable[Record]) -> float:
    """Time of all supervisors from start to end; for one that still runs, to now. Of one that was killed, and wrote no
    end, the time counts until the next one began: there is one at a time."""
    last: dict[str, Record] = {}
    began: dict[str, float] = {}
    for record in records:
        last[record["job"]] = record
        began.setdefault(record["job"], record["time"] - _clock(record))
    ends = [*list(began.values())[1:], time.time()]
    total = 0.0
    for record, end in zip(last.values(), ends, strict=True):
        total += _clock(record)
        if record["event"] == "first_step":
            total += max(0.0, end - record["time"])
    return total


def _clock(record: Record) -> float:
    """Seconds since its supervisor's start at which a record was made."""
    return float(record["at"] if record["event"] == "first_step" else record["ended"])


def _total(rows: list[Record]) -> Record:
    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return sum(values) / len(values) if values else None

    return {
        "count": len(rows),
        "mean_detect_seconds": mean("detect_seconds"),
        "mean_restart_seconds": mean("restart_seconds"),
        "lost_steps": sum(row["lost_steps"] or 0 for row in rows),
    }


def refresh_summary(run_dir: Path) -> None:
    """Bring the totals in ``summary.json`` up to date after the last rank has gone."""
    path = run_dir / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    totals = summarise(run_dir, float(summary.get("useful_seconds") or 0.0))
    if totals is not None:
        summary |= {"wall_seconds": totals["wall_seconds"], "goodput": totals["goodput"], "launches": totals}
        write_atomically(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
