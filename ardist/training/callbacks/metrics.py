"""The log point: one reduction over ranks, one line for people, one record for everything else."""

from __future__ import annotations

import logging
import math
import resource
import time
from typing import TYPE_CHECKING, Any

import torch

from ardist.training.callbacks.base import Callback
from ardist.training.engine import StepOutcome
from ardist.training.optimizer import learning_rate
from ardist.training.window import Window

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

_log = logging.getLogger("ardist.training")


class MetricsLog(Callback):
    """Every ``training.log_every`` steps, and at the first and the last step of a process."""

    def __init__(self) -> None:
        self._first = True

    def on_start(self, trainer: Trainer) -> None:
        trainer.window = Window(trainer.window.longest)

    def after_step(self, trainer: Trainer) -> None:
        due = trainer.step % trainer.config.training.log_every == 0 or trainer.step == trainer.total_steps
        if trainer.window.steps and (due or trainer.stopping or self._first):
            self._first = False
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        window, outcome = trainer.window, trainer.outcome
        means = window.means(trainer.world)
        seconds = time.perf_counter() - window.began - window.other_seconds
        record: dict[str, Any] = {
            "kind": "train",
            "step": trainer.step,
            "epoch": trainer.epoch,
            **_by_timestep(means),
            "lr": learning_rate(trainer.config.optimizer, trainer.step - 1, trainer.total_steps),
            "grad_norm": _number(outcome),
            **trainer.throughput.rates(window.clips, window.steps, seconds),
            "data_wait_fraction": window.data_seconds / max(seconds, 1e-9),
            "memory_gib": _memory(trainer.world.device),
            "samples": trainer.history.samples,
            "skipped_steps": trainer.history.skipped_steps,
            "time": time.time(),
        }
        trainer.history.useful_seconds += seconds
        trainer.records.write(record)
        if trainer.world.is_main:
            _log.info("%s", console_line(record, trainer.total_steps))
        trainer.window = Window(trainer.window.longest)


def _number(outcome: StepOutcome) -> float | None:
    return None if outcome.grad_norm is None else float(outcome.grad_norm)


def _by_timestep(means: dict[str, Any]) -> dict[str, Any]:
    """Mean loss in equal ranges of timesteps from the sums and numbers of frames; None where no frame fell."""
    sums, frames = means.pop("timestep_loss_sum", None), means.pop("timestep_frames", None)
    if sums is not None and frames is not None:
        means["loss_per_timestep"] = [
            total / count if count else None for total, count in zip(sums, frames, strict=True)
        ]
    return means


def _memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU where there is one, of the host otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def console_line(record: dict[str, Any], total_steps: int) -> str:
    """One line for people; what is not known is n/a."""

    def shown(name: str, pattern: str) -> str:
        value = record.get(name)
        return "n/a" if value is None or not math.isfinite(value) else format(value, pattern)

    mfu = record.get("mfu")
    return " · ".join(
        [
            f"step {record['step']}/{total_steps}",
            f"loss {shown('loss', '.4f')}",
            f"grad {shown('grad_norm', '.3f')}",
            f"lr {shown('lr', '.2e')}",
            f"{shown('clips_per_second', '.1f')} clips/s",
            f"{shown('tokens_per_second', ',.0f')} tokens/s",
            _flops(record.get("tflops")),
            f"MFU {'n/a' if mfu is None else format(mfu, '.1%')}",
            f"data wait {shown('data_wait_fraction', '.1%')}",
            f"{shown('memory_gib', '.1f')} GiB",
        ]
    )


def _flops(tflops: float | None) -> str:
    if tflops is None:
        return "n/a FLOP/s"
    return f"{tflops:.2f} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOP/s"
