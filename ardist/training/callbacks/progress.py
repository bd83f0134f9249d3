"""A progress bar for people at a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ardist.log import console
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class ProgressBar(Callback):
    """One bar over all steps on rank 0 when stderr is a terminal; nothing otherwise."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.is_main and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._progress.add_task("training", total=trainer.total_steps, completed=trainer.step)
            self._progress.start()

    def after_step(self, trainer: Trainer) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=trainer.step)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
