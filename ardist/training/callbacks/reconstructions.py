"""Held-out clips beside what the AR-VAE makes of them: a picture, and for clips a video, at every validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ardist.data.loader import read_samples
from ardist.data.manifest import load_manifest
from ardist.errors import ArdistError
from ardist.events import events
from ardist.inference.contact_sheet import contact_sheet
from ardist.inference.video_io import write_mp4
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

CLIPS = 4
COLUMNS = 8
CELL = 128
"""Height of a frame in the picture, in pixels."""
FPS = 8


class Reconstructions(Callback):
    """Writes ``samples/reconstruction-<step>.png`` (and ``.mp4``) of the averaged weights where there are any.

    Every rank makes the same forward passes, for ZeRO-3 gathers weights in each; rank 0 writes. A disk that is full or
    an ffmpeg that fails costs the picture, not the run.
    """

    def __init__(self) -> None:
        self._clips = torch.empty(0)

    def on_start(self, trainer: Trainer) -> None:
        path = trainer.config.validation.path
        assert path is not None
        total = load_manifest(path).num_samples
        count = min(CLIPS, total)
        self._clips = read_samples(path, [index * total // count for index in range(count)]).values

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % trainer.config.validation.every == 0 or trainer.step == trainer.total_steps:
            with trainer.outside_of_training():
                made = self._averaged(trainer)
                if trainer.world.is_main:
                    self._write(trainer, made)

    def _averaged(self, trainer: Trainer) -> Tensor:
        if trainer.ema is None:
            return self._reconstruct(trainer)
        averages = next(iter(trainer.ema.buffers.values()))
        trainer.engine.fragments.exchange(averages)
        try:
            return self._reconstruct(trainer)
        finally:
            trainer.engine.fragments.exchange(averages)

    def _reconstruct(self, trainer: Trainer) -> Tensor:
        """uint8 [n, f, h, w, 3] like the clips."""
        trainer.engine.train(False)
        pieces = []
        with torch.no_grad():
            for clip in self._clips.split(1):
                frames = clip.to(trainer.world.device).permute(0, 1, 4, 2, 3).float() / 255
                pixels = trainer.engine(frames)[0].clamp(0.0, 1.0)
                pieces.append((pixels * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu())
        trainer.engine.train(True)
        return torch.cat(pieces)

    def _write(self, trainer: Trainer, made: Tensor) -> None:
        path = trainer.run.path / "samples" / f"reconstruction-{trainer.step:08d}.png"
        pairs = [(true.numpy(), given.numpy()) for true, given in zip(self._clips, made, strict=True)]
        rows = [
            (f"clip {index + 1}, {kind}", frames)
            for index, pair in enumerate(pairs)
            for kind, frames in zip(("held out", "reconstructed"), pair, strict=True)
        ]
        try:
            path.parent.mkdir(exist_ok=True)
            contact_sheet(rows, path, max_columns=COLUMNS, cell=CELL)
            files = {"frames": path}
            if made.shape[1] > 1:
                video = path.with_suffix(".mp4")
                sides = [np.concatenate(pair, axis=2) for pair in pairs]
                write_mp4(video, np.concatenate(sides, axis=1), FPS)
                files["video"] = video
        except (OSError, ArdistError) as error:
            events.count("reconstructions.failed", step=trainer.step, reason=error)
            return
        media = {name: str(file.relative_to(trainer.run.path)) for name, file in files.items()}
        trainer.records.write({"kind": "reconstruction", "step": trainer.step, "media": media})
