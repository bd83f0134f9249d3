"""A log of the sample ids of every step, to compare runs with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ardist.events import events
from ardist.training.callbacks.base import Callback
from ardist.training.run_dir import append_line

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class SampleLog(Callback):
    """With ``debug.log_sample_ids``: one line per step and rank in ``logs/samples-rank-N.jsonl``."""

    def after_step(self, trainer: Trainer) -> None:
        ids = [f"{value & (2**64 - 1):016x}" for value in trainer.sample_ids.tolist()]
        path = trainer.run.logs / f"samples-rank-{trainer.world.rank:05d}.jsonl"
        try:
            append_line(path, {"step": trainer.step, "epoch": trainer.epoch, "ids": ids})
        except OSError as error:
            events.count("metrics.failed", step=trainer.step, reason=error)
