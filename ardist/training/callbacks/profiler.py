"""A torch profiler trace of a few steps, by configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ardist.events import events
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class Profiler(Callback):
    """Traces ``debug.profile_steps`` steps after ``debug.profile_step`` into ``logs/trace-rank-N.json``."""

    def __init__(self) -> None:
        self._profile: torch.profiler.profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        first = trainer.config.debug.profile_step
        if first is None:
            return
        if trainer.step == first and self._profile is None:
            self._profile = torch.profiler.profile()
            self._profile.start()
        elif self._profile is not None and trainer.step >= first + trainer.config.debug.profile_steps:
            self._finish(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if self._profile is not None:
            self._profile.stop()
            path = trainer.run.logs / f"trace-rank-{trainer.world.rank:05d}.json"
            try:
                self._profile.export_chrome_trace(str(path))
            except OSError as error:
                events.count("profile.failed", step=trainer.step, path=path, reason=error)
            self._profile = None
