"""Skipped steps made visible: counted, their samples written down, and an end put to a run that only skips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ardist.errors import ArdistError
from ardist.events import events
from ardist.training.callbacks.base import Callback
from ardist.training.run_dir import append_line
from ardist.training.state import roll_back

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class TrainingDivergedError(ArdistError):
    """Step after step had gradients that are not finite; the weights are those before the first of them."""


@dataclass
class _Step:
    step: int
    epoch: int
    skipped: torch.Tensor | bool
    sample_ids: torch.Tensor
    num_frames: int
    loss: torch.Tensor


class SkippedSteps(Callback):
    """Follows which steps were skipped because loss or gradient was not finite on some rank.

    A skip that DeepSpeed decided is known at once; one that the device decided is read at the next log point. After
    ``training.max_skipped_in_row`` skips in a row the run goes back to its last checkpoint, once, and then ends.
    """

    def __init__(self) -> None:
        self._open: list[_Step] = []
        self._in_row = 0
        self._rolled_back = False

    def after_step(self, trainer: Trainer) -> None:
        skipped = trainer.outcome.skipped
        self._open.append(
            _Step(
                trainer.step,
                trainer.epoch,
                skipped,
                trainer.sample_ids,
                trainer.num_frames,
                torch.stack(trainer.losses).mean(),
            )
        )
        due = trainer.step % trainer.config.training.log_every == 0 or trainer.step == trainer.total_steps
        if isinstance(skipped, bool) or due or trainer.stopping:
            self._read(trainer)

    def _read(self, trainer: Trainer) -> None:
        flags = [step.skipped for step in self._open]
        on_device = [flag for flag in flags if isinstance(flag, torch.Tensor)]
        read = iter(torch.stack(on_device).tolist() if on_device else [])
        for step in self._open:
            skipped = bool(next(read)) if isinstance(step.skipped, torch.Tensor) else step.skipped
            self._in_row = self._in_row + 1 if skipped else 0
            if skipped:
                self._report(trainer, step)
        self._open.clear()
        if self._in_row >= trainer.config.training.max_skipped_in_row:
            self._give_up(trainer)

    def _report(self, trainer: Trainer, step: _Step) -> None:
        trainer.history.skipped_steps += 1
        loss = float(step.loss)
        device_ids = step.sample_ids.to(trainer.world.device)
        mine = {
            "rank": trainer.world.rank,
            "loss": loss if math.isfinite(loss) else str(loss),
            "sample_ids": [f"{value & (2**64 - 1):016x}" for value in step.sample_ids.tolist()],
            **trainer.objective.describe(device_ids, step.epoch, step.num_frames),
        }
        ranks = trainer.world.all_gather(mine)
        if trainer.world.is_main:
            guilty = [rank["rank"] for rank in ranks if isinstance(rank["loss"], str)]
            events.count("training.skipped_step", step=step.step, ranks_with_bad_loss=guilty)
            append_line(trainer.run.skipped_steps, {"step": step.step, "epoch": step.epoch, "ranks": ranks})

    def _give_up(self, trainer: Trainer) -> None:
        count, self._in_row = self._in_row, 0
        if not self._rolled_back and roll_back(trainer):
            self._rolled_back = True
            return
        raise TrainingDivergedError(
            f"{count} steps in a row up to step {trainer.step} had gradients that are not finite; the samples are "
            f"listed in {trainer.run.skipped_steps}. Lower optimizer.lr or optimizer.grad_clip, or look at the data"
        )
