"""Skipped steps and spikes made visible: counted, their samples written down, and an end put to a run that only
skips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ardist.errors import ArdistError
from ardist.events import events
from ardist.training.callbacks.base import Callback
from ardist.training.engine import StepOutcome
from ardist.training.run_dir import append_line
from ardist.training.state import roll_back

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class TrainingDivergedError(ArdistError):
    """Step after step was skipped; the weights are those before the first of them."""


@dataclass
class _Step:
    step: int
    epoch: int
    outcome: StepOutcome
    sample_ids: torch.Tensor
    num_frames: int
    loss: torch.Tensor


class SkippedSteps(Callback):
    """Follows which steps were skipped, because loss or gradient was not finite on some rank or the gradient norm was
    a spike, and which spikes were only to be counted.

    A skip that DeepSpeed decided is known at once; what the device decided is read at the next log point, and before a
    checkpoint, so that whoever continues from it knows of all steps before it. After
    ``training.max_skipped_in_row`` skips in a row the run goes back to its last checkpoint. Where that did not help, or
    it happens again before ``training.good_steps_to_go_back_again`` steps were made behind the place, the run ends. All
    of this is the same on every rank, and part of a checkpoint. In fp16 an overflow does not count as a skip in a row
    while the loss scale can still fall.
    """

    def __init__(self) -> None:
        self._open: list[_Step] = []

    def after_step(self, trainer: Trainer) -> None:
        self._open.append(
            _Step(
                trainer.step,
                trainer.epoch,
                trainer.outcome,
                trainer.sample_ids,
                trainer.num_frames,
                torch.stack(trainer.losses).mean(),
            )
        )
        if trainer.outcomes_due:
            self._read(trainer)

    def _read(self, trainer: Trainer) -> None:
        history = trainer.history
        skips = _values([step.outcome.skipped for step in self._open])
        spikes = _values([step.outcome.spike for step in self._open])
        for step, skipped, spike in zip(self._open, skips, spikes, strict=True):
            answered = (skipped or spike) and self._report(trainer, step, skipped, spike)
            if not answered:
                history.skipped_in_row = history.skipped_in_row + 1 if skipped else 0
            if not skipped:
                history.made_good_step(step.step)
        self._open.clear()
        if history.skipped_in_row >= trainer.config.training.max_skipped_in_row:
            self._give_up(trainer)

    def _report(self, trainer: Trainer, step: _Step, skipped: bool, spike: bool) -> bool:
        """Count and write down; True for an overflow in fp16 that a lower loss scale is the answer to."""
        trainer.history.skipped_steps += skipped
        loss = float(step.loss)
        device_ids = step.sample_ids.to(trainer.world.device)
        mine = {
            "rank": trainer.world.rank,
            "loss": loss if math.isfinite(loss) else str(loss),
            "sample_ids": [f"{value & (2**64 - 1):016x}" for value in step.sample_ids.tolist()],
            **trainer.objective.describe(device_ids, step.epoch, step.num_frames),
        }
        ranks = trainer.world.all_gather(mine)
        guilty = [rank["rank"] for rank in ranks if isinstance(rank["loss"], str)]
        scale = trainer.engine.loss_scale
        overflow = skipped and not spike and not guilty and scale.value is not None
        answered = overflow and scale.can_fall
        if not trainer.world.is_main:
            return answered
        reason = "gradient spike" if spike else "fp16 overflow" if overflow else "not finite"
        norm = None if step.outcome.grad_norm is None else float(step.outcome.grad_norm)
        if spike:
            events.count("training.gradient_spike", step=step.step, grad_norm=norm, skipped=skipped)
        if skipped:
            events.count("training.skipped_step", step=step.step, reason=reason, ranks_with_bad_loss=guilty)
        if overflow and not answered:
            events.count("training.loss_scale_floor", step=step.step, loss_scale=scale.value)
        record = {"step": step.step, "epoch": step.epoch, "reason": reason, "skipped": skipped}
        if scale.value is not None:
            record["loss_scale"] = scale.value
        finite_norm = norm if norm is not None and math.isfinite(norm) else str(norm)
        try:
            append_line(trainer.run.skipped_steps, {**record, "grad_norm": finite_norm, "ranks": ranks})
        except OSError as error:
            events.count("metrics.failed", step=step.step, reason=error)
        return answered

    def _give_up(self, trainer: Trainer) -> None:
        history, needed = trainer.history, trainer.config.training.good_steps_to_go_back_again
        count, history.skipped_in_row = history.skipped_in_row, 0
        again = history.went_back_from is not None
        if not (again and history.good_steps_since < needed) and roll_back(trainer):
            return
        before = (
            f" The run had gone back from step {history.went_back_from} already, {history.good_steps_since} good steps "
            f"behind it; training.good_steps_to_go_back_again asks for {needed}."
        )
        raise TrainingDivergedError(
            f"{count} steps in a row up to step {trainer.step} were skipped, for gradients that are not finite or "
            f"spikes; their samples are listed in {trainer.run.skipped_steps}. Lower optimizer.lr or "
            f"optimizer.grad_clip, or look at the data.{before * again}"
        )


def _values(flags: list[torch.Tensor | bool]) -> list[bool]:
    """Flags of steps on the host; those on the device come in one read."""
    on_device = [flag.float() for flag in flags if isinstance(flag, torch.Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else [])
    return [bool(next(read)) if isinstance(flag, torch.Tensor) else flag for flag in flags]
