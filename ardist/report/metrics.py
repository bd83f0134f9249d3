"""Reading a run's metrics.jsonl back, one record per log point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ardist.errors import DataError

Record = dict[str, Any]


def read_metrics(run_dir: Path) -> list[Record]:
    """All records of a run in the order of their step; after a resume the later record of a step wins.

    A last line without its newline is one that a killed run did not finish and is left out.
    """
    path = run_dir / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{str(run_dir)!r} is no run directory: it holds no metrics.jsonl") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is damaged: {error}") from None
    latest: dict[tuple[str, int], Record] = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            latest[(str(record.get("kind", "train")), int(record["step"]))] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number} is not a metrics record: {error!r}") from None
    return sorted(latest.values(), key=lambda record: int(record["step"]))


def series(records: list[Record], name: str, kind: str = "train") -> tuple[list[int], list[float]]:
    """Steps and values of one scalar metric."""
    chosen = [record for record in records if record.get("kind", "train") == kind and record.get(name) is not None]
    return [int(record["step"]) for record in chosen], [float(record[name]) for record in chosen]
