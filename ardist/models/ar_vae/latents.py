"""Do the latents suit a denoiser? Unit length, and every channel in use: counted over clips, in sums that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

HISTOGRAM_BINS = 40
"""Equal bins over [-1, 1], the range of a unit vector's components."""

STILL = 0.01
"""A channel (or one channel of one token) that varies less than this says nothing. On the unit sphere with four
channels in even use the standard deviation is 0.5."""

NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LatentStatistics:
    """Sums over frames: of the values of each token and channel, of their squares, a histogram of each channel."""

    frames: float
    sums: Float64[Tensor, "l c"]
    squares: Float64[Tensor, "l c"]
    histogram: Float64[Tensor, "c bins"]
    norm_error: float
    """Largest distance of a token's length from 1."""

    @classmethod
    def of(cls, latents: Float[Tensor, "b f l c"]) -> LatentStatistics:
        """Statistics of some clips."""
        values = latents.detach().double().flatten(0, 1)
        channels = values.flatten(0, 1)
        histogram = torch.stack([torch.histc(column, HISTOGRAM_BINS, -1.0, 1.0) for column in channels.T])
        return cls(
            frames=float(len(values)),
            sums=values.sum(dim=0),
            squares=values.square().sum(dim=0),
            histogram=histogram,
            norm_error=(channels.norm(dim=1) - 1.0).abs().max().item(),
        )

    def to_list(self) -> list[float]:
        """All numbers in one flat list, to travel between ranks."""
        parts = [part.flatten().tolist() for part in (self.sums, self.squares, self.histogram)]
        return [self.frames, self.norm_error, *(value for part in parts for value in part)]

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[float]], tokens: int, channels: int) -> LatentStatistics:
        """The statistics of all clips together, from `to_list` of each."""
        table = torch.tensor(lists, dtype=torch.float64)
        size = tokens * channels
        total = table.sum(dim=0)
        sums, squares, histogram = total[2:].split([size, size, channels * HISTOGRAM_BINS])
        return cls(
            frames=float(total[0]),
            sums=sums.view(tokens, channels),
            squares=squares.view(tokens, channels),
            histogram=histogram.view(channels, HISTOGRAM_BINS),
            norm_error=float(table[:, 1].max()),
        )

    def channel_std(self) -> Float64[Tensor, " c"]:
        """Standard deviation of each channel over frames and tokens."""
        mean = self.sums.mean(dim=0) / self.frames
        return (self.squares.mean(dim=0) / self.frames - mean.square()).clamp(min=0.0).sqrt()

    def token_std(self) -> Float64[Tensor, "l c"]:
        """Standard deviation of each channel of each token over frames."""
        mean = self.sums / self.frames
        return (self.squares / self.frames - mean.square()).clamp(min=0.0).sqrt()

    def describe(self) -> dict[str, Any]:
        """For a validation record: mean and standard deviation by channel, what stands still, the histogram."""
        std = self.channel_std()
        return {
            "latent_mean": (self.sums.mean(dim=0) / self.frames).tolist(),
            "latent_std": std.tolist(),
            "latent_still_channels": [index for index, value in enumerate(std.tolist()) if not value >= STILL],
            "latent_still_values": int((~(self.token_std() >= STILL)).sum()),
            "latent_norm_error": self.norm_error,
            "latent_histogram": self.histogram.tolist(),
        }


def latent_problems(record: dict[str, Any]) -> list[str]:
    """What makes the latents of a validation record unfit for a denoiser, one line each; empty when they suit it."""
    problems = [
        f"channel {channel} is constant (standard deviation {record['latent_std'][channel]:.2g})"
        for channel in record.get("latent_still_channels") or ()
    ]
    error = record.get("latent_norm_error")
    if "latent_norm_error" in record and (error is None or error > NORM_TOLERANCE):
        problems.append(f"tokens are not of unit length (off by {'n/a' if error is None else format(error, '.2g')})")
    return problems
