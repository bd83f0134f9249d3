"""The totals of a run as they were when it last went back to a checkpoint, in a small file of its directory.

The checkpoint that it went back to is older than that and cannot say so; the next one will. The file is for a run that
ends between the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ardist.events import events
from ardist.training.distributed import World
from ardist.training.run_dir import write_atomically


def record(path: Path, history: Mapping[str, Any]) -> None:
    """Rank 0: write down the totals of a run that goes back. Where that cannot be, it is counted: training goes on."""
    try:
        write_atomically(path, json.dumps(history, allow_nan=False) + "\n")
    except OSError as error:
        events.count("training.rollback_not_recorded", path=path, reason=error)


def newer(path: Path, saved: Mapping[str, Any], world: World) -> Mapping[str, Any]:
    """The totals to continue with (collective): those of a checkpoint, `saved`, unless the run has gone back since.

    Then they are the recorded ones, but for the useful time, which is that of the steps up to the checkpoint.
    """
    found = world.broadcast(_read(path) if world.is_main else None)
    if found is None or found["rollbacks"] <= int(saved.get("rollbacks", 0)):
        return saved
    return {**found, "useful_seconds": saved["useful_seconds"]}


def forget(path: Path) -> None:
    """Rank 0: a run that begins anew in this directory has not gone back."""
    path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "rollbacks": int(found["rollbacks"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        events.count("training.rollback_unreadable", path=path, reason=f"{type(error).__name__}: {error}")
        return None
