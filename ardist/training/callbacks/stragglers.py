"""A rank that keeps the others waiting is named; the run goes on."""

from __future__ import annotations

import logging
import statistics
from typing import TYPE_CHECKING

import torch

from ardist.events import events
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

_log = logging.getLogger("ardist.training")
RATIO = 2.0
LEAST_SECONDS = 0.05


class Stragglers(Callback):
    """Compares the ranks at every log point by the time from a step's start to its last backward pass.

    Until then a rank waits for no other (ZeRO 0 to 2), so that the time is its own: loader, host, forward pass. With a
    GPU it is the host's time, which does not see a slow device.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._step = 0

    def on_start(self, trainer: Trainer) -> None:
        self._seconds, self._step = trainer.own_seconds, trainer.step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.world.size == 1 or trainer.step % trainer.config.training.log_every or trainer.step <= self._step:
            return
        steps = trainer.step - self._step
        # Over the group of the gradients: on the control group an agreement may be under way.
        mine = torch.zeros(trainer.world.size, device=trainer.world.device)
        mine[trainer.world.rank] = (trainer.own_seconds - self._seconds) / steps
        everyone = (trainer.world.mean(mine) * trainer.world.size).tolist()
        self._seconds, self._step = trainer.own_seconds, trainer.step
        if not trainer.world.is_main:
            return
        usual = statistics.median_low(everyone)
        slow = {rank: own for rank, own in enumerate(everyone) if own > max(RATIO * usual, usual + LEAST_SECONDS)}
        for rank, own in slow.items():
            events.count("training.straggler", rank=rank, seconds_per_step=f"{own:.3f}", median=f"{usual:.3f}")
        if slow:
            table = " ".join(f"{rank}:{own:.3f}" for rank, own in enumerate(everyone))
            _log.info("seconds per step of every rank before it waits for the others: %s", table)
