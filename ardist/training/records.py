"""What a run writes about itself: metrics.jsonl, the trackers, summary.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from ardist import fault
from ardist.events import events
from ardist.training import goodput
from ardist.training.run_dir import append_line, write_atomically
from ardist.training.tracking import Tracker, open_tracker

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class Records:
    """Rank 0 writes, the other ranks only keep the last record of each kind. A full disk does not stop training."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.last: dict[str, dict[str, Any]] = {}
        self.tracker: Tracker | None = None
        if trainer.world.is_main:
            self.tracker = open_tracker(trainer.config, trainer.run.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl and hand it to the trackers."""
        record = {name: _finite(value) for name, value in record.items()}
        self.last[record["kind"]] = record
        if not self.trainer.world.is_main:
            return
        try:
            fault.point("trainer.metrics")
            append_line(self.trainer.run.metrics, record)
        except OSError as error:
            events.count("metrics.failed", step=self.trainer.step, reason=error)
        if self.tracker is not None:
            self.tracker.log(record)

    def write_summary(self) -> None:
        """Write ``summary.json``: where the run stands, how its time was spent, every event of every rank."""
        trainer = self.trainer
        gathered = trainer.world.all_gather(events.snapshot())
        if not trainer.world.is_main:
            return
        history, wall = trainer.history, trainer.history.wall_seconds()
        counts = Counter(history.earlier_events)
        for rank_counts in gathered:
            counts.update(rank_counts)
        summary = {
            "completed": trainer.step >= trainer.total_steps,
            "step": trainer.step,
            "steps": trainer.total_steps,
            "samples": history.samples,
            "skipped_steps": history.skipped_steps,
            "useful_seconds": history.useful_seconds,
            "wall_seconds": wall,
            "goodput": history.useful_seconds / wall if wall else None,
            "sessions": history.sessions,
            "world_size": trainer.world.size,
            "zero_stage": trainer.config.training.zero_stage,
            "last_checkpoint": trainer.writer.last_saved,
            "checkpoint_blocked_seconds": history.blocked_seconds,
            "events": dict(sorted(counts.items())),
            **{f"last_{kind}": _scalars(record) for kind, record in self.last.items()},
        }
        launches = goodput.summarise(trainer.run.path, history.useful_seconds)
        if launches is not None:
            # The supervisor also counts the time in which no rank ran.
            summary |= {"wall_seconds": launches["wall_seconds"], "goodput": launches["goodput"], "launches": launches}
        try:
            text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
            write_atomically(trainer.run.summary, text)
        except OSError as error:
            events.count("summary.failed", reason=error)

    def close(self) -> None:
        """Give the trackers a bounded time to finish."""
        if self.tracker is not None:
            self.tracker.finish()


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not isinstance(value, list | dict)}
