"""A last look at the first batches: are these the latents that the manifest describes?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ardist.data.manifest import Manifest
from ardist.data.shard_writer import real_values
from ardist.errors import DataError

BATCHES = 50
_SIGMAS = 5.0
_SCALES = 5.0
_VECTORS = 1024


class LatentSanity:
    """Compares the values of the first 50 batches with the manifest's latent statistics.

    Digests already tell one dataset from another; this catches a dataset whose numbers were changed after its
    statistics were taken (another scale factor, another autoencoder). The clips that one rank meets first may all be
    of one video, so only what no video explains is refused: a channel whose mean is more than five deviations away,
    or whose deviation is more than five times too large or too small for all of them together. Raises `DataError`.
    """

    def __init__(self, manifest: Manifest, path: str) -> None:
        statistics = manifest.latent_statistics
        self.batches_left = BATCHES if statistics is not None and manifest.dtype != "uint8" else 0
        self._path, self._dtype, self._count = path, manifest.dtype, 0
        channels = manifest.shape[-1]
        self._mean = np.array(statistics.mean if statistics else [0.0] * channels)
        self._std = np.array(statistics.std if statistics else [1.0] * channels)
        self._total, self._squares = np.zeros(channels), np.zeros(channels)

    def look(self, values: torch.Tensor) -> None:
        """Take one batch [m, F, L, C] into account; not called any more when no batches are left."""
        self.batches_left -= 1
        # numpy, because torch would wake all its threads for this; a spread-out part of a batch tells the same.
        stored = values.view(torch.uint16) if self._dtype == "bfloat16" else values
        flat = stored.numpy().reshape(-1, values.shape[-1])
        # An even step would meet the same few places of every frame: their tokens are mostly a power of two.
        flat = real_values(flat[:: len(flat) // _VECTORS | 1], self._dtype).astype(np.float64)
        self._count += len(flat)
        self._total += flat.sum(0)
        self._squares += (flat * flat).sum(0)
        mean = self._total / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0))
        away = (np.abs(mean - self._mean) / self._std).max()
        # One channel may well be quiet in one video; all of them at once are not.
        scale = np.exp(np.log(np.maximum(std / self._std, 1e-12)).mean())
        if away > _SIGMAS or not 1 / _SCALES < scale < _SCALES:
            raise DataError(
                f"the latents of {self._path} are not those of its manifest: over the first {self._count} vectors the "
                f"channels have mean {_shown(mean)} and deviation {_shown(std)}, the manifest says "
                f"{_shown(self._mean)} and {_shown(self._std)}. Were they made by another VAE or scaled differently?"
            )


def _shown(values: npt.NDArray[Any]) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values[:8].tolist()) + (", …]" if len(values) > 8 else "]")
