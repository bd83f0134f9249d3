"""A last look at the first batches: are these the latents that the manifest describes?"""

from __future__ import annotations

import torch

from ardist.data.manifest import Manifest
from ardist.errors import DataError

BATCHES = 50
_SIGMAS = 5.0
_SCALES = 5.0


class LatentSanity:
    """Compares the values of the first 50 batches with the manifest's latent statistics.

    Digests already tell one dataset from another; this catches a dataset whose numbers were changed after its
    statistics were taken (another scale factor, another autoencoder). The clips that one rank meets first may all be
    of one video, so only what no video explains is refused: a channel whose mean is more than five deviations away,
    or whose deviation is more than five times too large or too small for all of them together. Raises `DataError`.
    """

    def __init__(self, manifest: Manifest, path: str) -> None:
        statistics = manifest.latent_statistics
        self._left = BATCHES if statistics is not None and manifest.dtype != "uint8" else 0
        self._path, self._count = path, 0
        if statistics is not None:
            self._mean = torch.tensor(statistics.mean, dtype=torch.float64)
            self._std = torch.tensor(statistics.std, dtype=torch.float64)
            self._total, self._squares = torch.zeros_like(self._mean), torch.zeros_like(self._mean)

    def look(self, values: torch.Tensor) -> None:
        """Take one batch [m, F, L, C] into account; free of cost once the first batches are through."""
        if not self._left:
            return
        self._left -= 1
        flat = values.reshape(-1, values.shape[-1]).double()
        self._count += len(flat)
        self._total += flat.sum(0)
        self._squares += (flat * flat).sum(0)
        mean = self._total / self._count
        std = (self._squares / self._count - mean**2).clamp_min(0).sqrt()
        away = ((mean - self._mean).abs() / self._std).max()
        # One channel may well be quiet in one video; all of them at once are not.
        scale = (std / self._std).clamp_min(1e-12).log().mean().exp()
        if away > _SIGMAS or not 1 / _SCALES < scale < _SCALES:
            raise DataError(
                f"the latents of {self._path} are not those of its manifest: over the first {self._count} values a "
                f"channel has mean {_shown(mean)} and deviation {_shown(std)}, the manifest says {_shown(self._mean)} "
                f"and {_shown(self._std)} (per channel). Were they made by another VAE or scaled differently?"
            )


def _shown(values: torch.Tensor) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values[:8].tolist()) + (", …]" if len(values) > 8 else "]")
