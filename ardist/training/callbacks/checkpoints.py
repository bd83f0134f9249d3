"""When checkpoints are taken."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ardist.errors import CheckpointError
from ardist.events import events
from ardist.training.callbacks.base import Callback
from ardist.training.state import snapshot

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

ATTEMPTS = 3
PAUSE_SECONDS = 2.0


class Checkpoints(Callback):
    """Every ``checkpoint.every`` steps in the background, and at the end of the process until it is on disk."""

    def after_step(self, trainer: Trainer) -> None:
        due = trainer.step % trainer.config.checkpoint.every == 0 and trainer.step < trainer.total_steps
        if due and trainer.writer.last_saved != trainer.step:
            with trainer.outside_of_training():
                trainer.writer.save(snapshot(trainer))
                trainer.records.write_summary()

    def on_end(self, trainer: Trainer) -> None:
        with trainer.outside_of_training():
            trainer.writer.wait()
            if trainer.writer.last_saved != trainer.step:
                self._insist(trainer)

    def _insist(self, trainer: Trainer) -> None:
        """The last save decides whether the run may be called safe, so it is tried again."""
        for attempt in range(ATTEMPTS):
            try:
                return trainer.writer.save(snapshot(trainer), wait=True)
            except CheckpointError:
                if attempt == ATTEMPTS - 1:
                    raise
                events.count("checkpoint.retry", attempt=attempt + 1)
                time.sleep(PAUSE_SECONDS * (attempt + 1))
        return None
