"""How well an autoencoder gives clips back: PSNR, SSIM and flicker.

Frames are floating-point RGB in [0, 1], clips `[b, f, c, h, w]`. Every measure is one float64 number per clip; average
over clips for a dataset. Errors are pooled over all frames of a clip before the logarithm of PSNR.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor
from torch.nn import functional

from ardist.errors import InvalidValueError

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K L)^2 for values in [0, 1]


def psnr(reconstructed: Shaped[Tensor, "..."], clips: Shaped[Tensor, "..."]) -> Float64[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB, peak 1; infinite where a clip is reproduced exactly."""
    check_frames(reconstructed, clips)
    return torch.stack([_psnr(given, true) for given, true in zip(reconstructed, clips, strict=True)])


def ssim(reconstructed: Shaped[Tensor, "..."], clips: Shaped[Tensor, "..."]) -> Float64[Tensor, " b"]:
    """Structural similarity, at most 1, averaged over positions, channels and frames.

    Wang et al. (2004): 11x11 Gaussian window of sigma 1.5, population moments, K = (0.01, 0.03), each channel by
    itself, only positions where the window fits. Sides below 11 pixels raise InvalidValueError.
    """
    check_frames(reconstructed, clips)
    if min(clips.shape[-2:]) < SSIM_WINDOW:
        raise InvalidValueError(
            f"frames of {clips.shape[-2]}x{clips.shape[-1]} are too small for SSIM; legal: 11x11 up"
        )
    return torch.stack([_ssim(given, true) for given, true in zip(reconstructed, clips, strict=True)])


def temporal_flicker(reconstructed: Shaped[Tensor, "..."], clips: Shaped[Tensor, "..."]) -> Float64[Tensor, " b"]:
    """Mean absolute difference between the frame-to-frame change of the reconstruction and that of the clip.

    0 for a perfect reconstruction, for one whose error stands still, and for clips of one frame; in units of the value
    range.
    """
    check_frames(reconstructed, clips)
    if clips.shape[1] < 2:
        return torch.zeros(len(clips), dtype=torch.float64, device=clips.device)
    error = reconstructed.double() - clips.double()
    return error.diff(dim=1).abs().flatten(1).mean(dim=1)


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


def check_frames(given: Tensor, true: Tensor) -> None:
    """Raise InvalidValueError unless both are of one shape, floating point, not empty and in [0, 1]."""
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
