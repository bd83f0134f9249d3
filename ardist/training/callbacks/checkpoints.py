"""When checkpoints are taken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        if trainer.checkpoint_due and trainer.writer.last_saved != trainer.step:
            with trainer.outside_of_training():
                with self._standing_still(trainer):
                    trainer.writer.save(snapshot(trainer))
                trainer.records.write_summary()

    def on_end(self, trainer: Trainer) -> None:
        with trainer.outside_of_training():
            began = time.perf_counter()
            trainer.writer.wait()
            trainer.history.blocked_seconds += time.perf_counter() - began
            if trainer.writer.last_saved != trainer.step:
                with self._standing_still(trainer):
                    self._insist(trainer)

    @contextmanager
    def _standing_still(self, trainer: Trainer) -> Iterator[None]:
        """Record how long a save keeps the loop, and how much of that is a wait for the write before it."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        trainer.history.blocked_seconds += seconds
        record = {"kind": "save", "step": trainer.step, "blocked_seconds": seconds}
        trainer.records.write(record | {"waited_seconds": trainer.writer.waited_seconds, "time": time.time()})

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
