"""Reconstruction measures against values worked out by hand, literal loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ardist.errors import InvalidValueError
from ardist.evaluation.reconstruction import best_constant_colour_psnr, pca_psnr, psnr, ssim, temporal_flicker


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_known_errors() -> None:
    true = torch.full((3, 2, 3, 4, 4), 0.5)
    given = true.clone()
    given[0] += 0.1
    given[1, 0] += 0.2  # one of two frames: the errors are pooled before the logarithm
    values = psnr(given, true)
    assert values.dtype == torch.float64
    assert values[:2].tolist() == pytest.approx([20.0, -10 * math.log10(0.04 / 2)], abs=1e-5)
    assert values[2] == math.inf


def literal_ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """One channel, position by position, with the two-dimensional window of the definition."""
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    window = torch.tensor(weights, dtype=torch.float64)
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return float(torch.stack(values).mean())


def test_ssim_is_the_definition() -> None:
    true = clips(2, 2, 3, 14, 17).double()
    given = (true + 0.3 * (clips(2, 2, 3, 14, 17, seed=1) - 0.5)).clamp(0, 1)
    expected = [
        sum(literal_ssim(given[b, f, c], true[b, f, c]) for f in range(2) for c in range(3)) / 6 for b in range(2)
    ]
    assert ssim(given, true).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_of_equal_and_of_constant_frames() -> None:
    true = clips(1, 2, 3, 16, 16)
    assert ssim(true, true).item() == pytest.approx(1)
    dark, bright = torch.full((1, 1, 3, 16, 16), 0.2), torch.full((1, 1, 3, 16, 16), 0.6)
    assert ssim(dark, bright).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-6)
    assert ssim(1 - true, true).item() < 0


def test_flicker_sees_errors_that_move_and_only_those() -> None:
    true = clips(3, 4, 3, 8, 8) * 0.5 + 0.2
    given = true.clone()
    given[0] += 0.1  # stands still
    given[1, ::2] += 0.1  # on, off, on, off
    assert temporal_flicker(given, true).tolist() == pytest.approx([0, 0.1, 0], abs=1e-6)
    assert temporal_flicker(given[:, :1], true[:, :1]).tolist() == [0, 0, 0]


def test_best_constant_colour_is_the_mean_colour_of_the_clip() -> None:
    true = clips(2, 3, 3, 8, 8)
    variance = true.double().permute(0, 2, 1, 3, 4).flatten(2).var(dim=2, unbiased=False).mean(dim=1)
    best = best_constant_colour_psnr(true)
    assert best.tolist() == pytest.approx((-10 * variance.log10()).tolist(), rel=1e-6)
    for shift in (0.01, -0.01):
        other = true.mean(dim=(1, 3, 4), keepdim=True).expand(true.shape) + shift
        assert (psnr(other, true) < best).all()


@pytest.mark.parametrize("num_frames", [12, 60])
def test_pca_keeps_what_lies_in_its_span(num_frames: int) -> None:
    """Frames of 48 values: fitted on fewer and on more frames than values."""
    basis = torch.linalg.qr(clips(48, 5, seed=2).double() - 0.5).Q
    codes = 0.2 * (clips(num_frames + 6, 5, seed=3).double() - 0.5)
    frames = (0.5 + codes @ basis.T).reshape(-1, 3, 4, 4)
    train, test = frames[:num_frames], frames[num_frames:].reshape(2, 3, 3, 4, 4)
    assert (pca_psnr(train, test, 5) > 200).all()
    assert (pca_psnr(train, test, 12) > 200).all(), "directions without variance must do no harm"
    assert (pca_psnr(train, test, 3) < 80).all()


def test_pca_error_is_the_tail_of_the_spectrum() -> None:
    """On the frames it was fitted on, the mean squared error is the sum of the dropped eigenvalues."""
    frames = 0.4 + 0.2 * clips(40, 3, 4, 4).double()
    singular = torch.linalg.svdvals(frames.flatten(1) - frames.flatten(1).mean(dim=0))
    expected = -10 * math.log10(float((singular[7:] ** 2).sum()) / frames.numel())
    assert pca_psnr(frames, frames.unsqueeze(0), 7).item() == pytest.approx(expected, abs=1e-6)


def test_bad_input_is_named() -> None:
    true = clips(2, 2, 3, 12, 12)
    with pytest.raises(InvalidValueError, match=r"shapes differ: \(2, 2, 3, 12, 12\) and \(1, 2, 3, 12, 12\)"):
        psnr(true, true[:1])
    with pytest.raises(InvalidValueError, match=r"torch\.uint8"):
        psnr((true * 255).byte(), (true * 255).byte())
    with pytest.raises(InvalidValueError, match=r"to 25\d.*; legal: 0\.\.1"):
        psnr(true * 255, true)
    with pytest.raises(InvalidValueError, match="legal: 0"):
        psnr(true * math.nan, true)
    with pytest.raises(InvalidValueError, match="no frames"):
        psnr(true[:0], true[:0])
    with pytest.raises(InvalidValueError, match="10x12 are too small for SSIM"):
        ssim(true[..., :10, :], true[..., :10, :])
    with pytest.raises(InvalidValueError, match=r"components=5 .* legal: 1\.\.4"):
        pca_psnr(true.flatten(0, 1), true, 5)
    with pytest.raises(InvalidValueError, match="frames to fit"):
        pca_psnr(true.flatten(0, 1)[..., :6], true, 2)
