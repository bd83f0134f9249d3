"""How well an autoencoder gives clips back, and two baselines to compare with.

Frames are floating-point RGB in [0, 1], clips `[b, f, c, h, w]`. Every measure is one float64 number per clip; average
over clips for a dataset. Errors are pooled over all frames of a clip before the logarithm of PSNR.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.models.ar_vae.fidelity import check_frames, psnr, ssim, temporal_flicker

__all__ = ["best_constant_colour_psnr", "pca_psnr", "psnr", "ssim", "temporal_flicker"]


def best_constant_colour_psnr(clips: Float[Tensor, "b f c h w"]) -> Float64[Tensor, " b"]:
    """PSNR of the single colour that suits each clip best, its mean: what any autoencoder has to beat."""
    return psnr(clips.double().mean(dim=(1, 3, 4), keepdim=True).expand(clips.shape).to(clips.dtype), clips)


def pca_psnr(
    train_frames: Float[Tensor, "n c h w"], test_clips: Float[Tensor, "b f c h w"], components: int = 128
) -> Float64[Tensor, " b"]:
    """PSNR of `test_clips` after projection on the first principal components of `train_frames`.

    The best linear code of `components` numbers per frame: what a nonlinear autoencoder with as many latents competes
    with. Exact (eigenvectors in float64 on the smaller side of the data), clamped to [0, 1].
    """
    check_frames(train_frames, train_frames)
    if train_frames.shape[1:] != test_clips.shape[2:]:
        raise InvalidValueError(
            f"frames to fit are {tuple(train_frames.shape[1:])}, frames to test {tuple(test_clips.shape[2:])}"
        )
    data = train_frames.double().flatten(1)
    if not 1 <= components <= min(data.shape):
        raise InvalidValueError(
            f"components={components} is out of range for {data.shape[0]} frames of {data.shape[1]} values; "
            f"legal: 1..{min(data.shape)}"
        )
    mean = data.mean(dim=0)
    axes = _principal_axes(data - mean, components)
    restored = [((clip.double().flatten(1) - mean) @ axes @ axes.T + mean).clamp(0, 1) for clip in test_clips]
    return psnr(torch.stack(restored).reshape(test_clips.shape), test_clips.double())


def _principal_axes(centred: Tensor, components: int) -> Tensor:
    """Orthonormal columns `[values, k]`, k <= components: directions without variance are left out."""
    tall = centred.shape[0] >= centred.shape[1]
    energies, vectors = torch.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    energies, vectors = energies[-components:], vectors[:, -components:]
    kept = energies > energies[-1].clamp(min=0) * 1e-12
    energies, vectors = energies[kept], vectors[:, kept]
    axes: Tensor = vectors if tall else centred.T @ vectors / energies.sqrt()
    return axes
