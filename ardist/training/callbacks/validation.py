"""Held-out measures at fixed noise and timesteps: the same numbers on any number of ranks."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from ardist.data.batch import Batch
from ardist.data.loader import read_samples
from ardist.data.manifest import load_manifest
from ardist.training.batches import DeviceCopy, single_clips
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

_log = logging.getLogger("ardist.training")


class Validation(Callback):
    """Every ``validation.every`` steps and at the last one, on clips spread evenly over the held-out set.

    A clip is evaluated alone and the means are taken in float64 over all clips in their order, so that who evaluates
    what does not matter; what is left are the last bits of kernels that round by the alignment of the weights.
    """

    def __init__(self) -> None:
        self._clips: list[Batch] = []
        self._indices: list[int] = []
        self._count = 0

    def on_start(self, trainer: Trainer) -> None:
        settings = trainer.config.validation
        assert settings.path is not None
        total = load_manifest(settings.path).num_samples
        self._count = min(settings.num_clips, total)
        world = trainer.world
        rounds = -(-self._count // world.size)
        # Every rank makes equally many forward passes, for ZeRO-3 gathers weights in each; the surplus is dropped.
        self._indices = [world.rank + world.size * turn for turn in range(rounds)]
        wanted = [min(index, self._count - 1) * total // self._count for index in self._indices]
        batch = DeviceCopy(world.device)(read_samples(settings.path, wanted))
        self._clips = list(single_clips(batch))

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % trainer.config.validation.every == 0 or trainer.step == trainer.total_steps:
            with trainer.outside_of_training():
                self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        measures = self._measure(trainer)
        if measures is None:
            return
        record: dict[str, Any] = {"kind": "validation", "step": trainer.step, **measures}
        if trainer.config.validation.weights == "both" and trainer.ema is not None:
            averages = next(iter(trainer.ema.buffers.values()))
            trainer.engine.fragments.exchange(averages)
            try:
                smooth = self._measure(trainer)
            finally:
                trainer.engine.fragments.exchange(averages)
            if smooth is None:
                return
            record |= {f"ema_{name}": value for name, value in smooth.items() if name != "clips"}
        record |= {"seconds": time.perf_counter() - began, "time": time.time()}
        trainer.records.write(record)
        if trainer.world.is_main:
            _log.info("%s", _line(record))

    def _measure(self, trainer: Trainer) -> dict[str, Any] | None:
        """Means over all clips; None when the run is asked to stop meanwhile: whoever asks does not wait for this."""
        mine: list[dict[str, list[float]]] = []
        trainer.engine.train(False)
        with torch.no_grad():
            for clip in self._clips:
                if trainer.step < trainer.total_steps and trainer.stop.agreed(trainer.step):
                    trainer.stopping = True
                    break
                mine.append(trainer.objective.evaluate(trainer.engine, clip))
        trainer.engine.train(True)
        if len(mine) < len(self._clips):
            if trainer.world.is_main:
                _log.info("validation at step %d was given up: the run is asked to stop", trainer.step)
            return None
        results: dict[int, dict[str, list[float]]] = {}
        for pairs in trainer.world.all_gather(list(zip(self._indices, mine, strict=True))):
            results |= {index: measures for index, measures in pairs if index < self._count}
        return trainer.objective.summarise([results[index] for index in range(self._count)])


def _line(record: dict[str, Any]) -> str:
    parts = [f"validation at step {record['step']}: loss {record['loss']:.4f}"]
    if "fraction_of_predict_zero" in record:
        parts.append(f"{record['fraction_of_predict_zero']:.3f} of the predict-zero level")
    if "psnr" in record:
        parts.append(f"PSNR {record['psnr']:.2f} dB")
    if "ema_loss" in record:
        parts.append(f"EMA weights {record['ema_loss']:.4f}")
    return " · ".join([*parts, f"{record['clips']} clips in {record['seconds']:.1f} s"])
