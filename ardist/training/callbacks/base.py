"""The hooks of a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class Callback:
    """Called by the trainer on every rank, in the order of the trainer's list. A hook may use collectives."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process, after a resume."""

    def after_step(self, trainer: Trainer) -> None:
        """After each optimiser step; `trainer.step` counts it already."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this process, be it complete or stopped; not after an error."""

    def close(self) -> None:
        """At the very end, after an error too."""
