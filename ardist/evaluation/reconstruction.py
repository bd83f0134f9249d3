"""How well an autoencoder gives clips back: PSNR, SSIM, flicker, and two baselines to compare with.

Frames are floating-point RGB in [0, 1], clips `[b, f, c, h, w]`. Every measure is one float64 number per clip; average
over clips for a dataset. Errors are pooled over all frames of a clip before the logarithm of PSNR.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from ardist.errors import InvalidValueError

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K L)^2 for values in [0, 1]


def psnr(reconstructed: Float[Tensor, "b f c h w"], clips: Float[Tensor, "b f c h w"]) -> Float64[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB, peak 1; infinite where a clip is reproduced exactly."""
    _check(reconstructed, clips)
    return torch.stack([_psnr(given, true) for given, true in zip(reconstructed, clips, strict=True)])


def ssim(reconstructed: Float[Tensor, "b f c h w"], clips: Float[Tensor, "b f c h w"]) -> Float64[Tensor, " b"]:
    """Structural similarity, at most 1, averaged over positions, channels and frames.

    Wang et al. (2004): 11x11 Gaussian window of sigma 1.5, population moments, K = (0.01, 0.03), each channel by
    itself, only positions where the window fits. Sides below 11 pixels raise InvalidValueError.
    """
    _check(reconstructed, clips)
    if min(clips.shape[-2:]) < SSIM_WINDOW:
        raise InvalidValueError(
            f"frames of {clips.shape[-2]}x{clips.shape[-1]} are too small for SSIM; legal: 11x11 up"
        )
    return torch.stack([_ssim(given, true) for given, true in zip(reconstructed, clips, strict=True)])


def temporal_flicker(
    reconstructed: Float[Tensor, "b f c h w"], clips: Float[Tensor, "b f c h w"]
) -> Float64[Tensor, " b"]:
    """Mean absolute difference between the frame-to-frame change of the reconstruction and that of the clip.

    0 for a perfect reconstruction, for one whose error stands still, and for clips of one frame; in units of the value
    range.
    """
    _check(reconstructed, clips)
    if clips.shape[1] < 2:
        return torch.zeros(len(clips), dtype=torch.float64, device=clips.device)
    error = reconstructed.double() - clips.double()
    return error.diff(dim=1).abs().flatten(1).mean(dim=1)


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
    _check(train_frames, train_frames)
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


def _psnr(reconstructed: Tensor, clip: Tensor) -> Tensor:
    return -10 * torch.log10((reconstructed.double() - clip.double()).square().mean())


def _ssim(reconstructed: Tensor, clip: Tensor) -> Tensor:
    x, y = (frames.double().flatten(0, 1).unsqueeze(1) for frames in (reconstructed, clip))
    position = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=clip.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (position / SSIM_SIGMA) ** 2)
    window = window / window.sum()

    def blur(frames: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(frames, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).mean()


def _check(given: Tensor, true: Tensor) -> None:
    if given.shape != true.shape:
        raise InvalidValueError(f"shapes differ: {tuple(given.shape)} and {tuple(true.shape)}")
    for frames in (given, true):
        if not frames.is_floating_point():
            raise InvalidValueError(f"frames of {frames.dtype} are not supported; legal: floating point in [0, 1]")
        if not frames.numel():
            raise InvalidValueError(f"there are no frames to measure in a tensor of shape {tuple(frames.shape)}")
        low, high = (float(bound) for bound in frames.aminmax())
        if not (low >= 0 and high <= 1):
            raise InvalidValueError(f"frames reach from {low:g} to {high:g}; legal: 0..1")
