"""Noise schedules with one timestep per frame, and the conversions between x0, eps and v.

Source: AR-Diffusion (arXiv 2503.07418), "Preliminaries"; the cosine schedule is that of Nichol & Dhariwal (2021), v
that of Salimans & Ho (2022). With abar the cumulative product of 1 - beta, a = sqrt(abar) and s = sqrt(1 - abar):

    x_t = a x0 + s eps        v = a eps - s x0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ardist.diffusion.shapes import check_clips, check_int64, check_shape
from ardist.errors import InvalidValueError, check_integer, choose

ScheduleKind = Literal["scaled_linear", "cosine"]
Target = Literal["x0", "eps", "v"]
SCHEDULES = ("scaled_linear", "cosine")
TARGETS = ("x0", "eps", "v")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much of the clean signal is left at each timestep; timesteps are 0..T-1 and larger is noisier.

    Tensors `x` are `[b, f, ...]` with one timestep per frame, `[b, f]`. Products are formed in float32 (float64 for
    float64 input) and returned in the dtype of the input. Tensors that would only fit by broadcasting and timesteps
    other than int64 raise InvalidValueError. So do timesteps out of range on CPU; on an accelerator that check would
    need a host sync, and the indexing kernel asserts instead.
    """

    kind: str
    alphas_cumprod: Float64[Tensor, " t"]
    """abar, float64, strictly decreasing inside (0, 1)."""

    @classmethod
    def create(cls, kind: str = "scaled_linear", num_timesteps: int = 1000) -> NoiseSchedule:
        """The schedule `kind`, one of SCHEDULES, of `num_timesteps` >= 2 steps, derived in float64 on CPU."""
        check_integer("num_timesteps", num_timesteps)
        if num_timesteps < 2:
            raise InvalidValueError(f"num_timesteps={num_timesteps} is out of range; legal: 2 and more")
        if choose("schedule", kind, SCHEDULES) == "scaled_linear":
            betas = torch.linspace(1e-4**0.5, 2e-2**0.5, num_timesteps, dtype=torch.float64) ** 2
        else:
            edge = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
            level = torch.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        return cls(kind, torch.cumprod(1 - betas, dim=0))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its table on `device`."""
        return NoiseSchedule(self.kind, self.alphas_cumprod.to(device))

    def abar(self, timesteps: Int64[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
        """abar of every timestep, float64."""
        check_int64("timesteps", timesteps)
        if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check(timesteps)
        return self.alphas_cumprod[timesteps]

    def check(self, timesteps: Int64[Tensor, "*n"]) -> None:
        """Raise InvalidValueError for a timestep outside 0..T-1; reads the values back to the host."""
        if timesteps.numel():
            low, high = (int(bound) for bound in timesteps.aminmax())
            if low < 0 or high >= self.num_timesteps:
                raise InvalidValueError(f"timesteps {low}..{high} are out of range; legal: 0..{self.num_timesteps - 1}")

    def snr(self, timesteps: Int64[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
        """Signal-to-noise ratio abar / (1 - abar), float64."""
        abar = self.abar(timesteps)
        return abar / (1 - abar)

    def add_noise(
        self, x0: Float[Tensor, "b f *x"], eps: Float[Tensor, "b f *x"], timesteps: Int64[Tensor, "b f"]
    ) -> Float[Tensor, "b f *x"]:
        """x_t: each frame of `x0` noised to its own timestep with the standard normal `eps`."""
        _check_shapes(timesteps, x0=x0, eps=eps)
        a, s = self._coefficients(timesteps, x0)
        return (a * x0 + s * eps).to(x0.dtype)

    def target(
        self, kind: str, x0: Float[Tensor, "b f *x"], eps: Float[Tensor, "b f *x"], timesteps: Int64[Tensor, "b f"]
    ) -> Float[Tensor, "b f *x"]:
        """What a network with prediction target `kind` (one of TARGETS) must return."""
        _check_shapes(timesteps, x0=x0, eps=eps)
        if _target(kind) == "v":
            a, s = self._coefficients(timesteps, x0)
            return (a * eps - s * x0).to(x0.dtype)
        return x0 if kind == "x0" else eps

    def to_x0(
        self,
        kind: str,
        prediction: Float[Tensor, "b f *x"],
        x_t: Float[Tensor, "b f *x"],
        timesteps: Int64[Tensor, "b f"],
    ) -> Float[Tensor, "b f *x"]:
        """x0 from a prediction of `kind` at `x_t`."""
        _check_shapes(timesteps, x_t=x_t, prediction=prediction)
        if _target(kind) == "x0":
            return prediction
        a, s = self._coefficients(timesteps, x_t)
        x0 = (x_t - s * prediction) / a if kind == "eps" else a * x_t - s * prediction
        return x0.to(prediction.dtype)

    def to_eps(
        self,
        kind: str,
        prediction: Float[Tensor, "b f *x"],
        x_t: Float[Tensor, "b f *x"],
        timesteps: Int64[Tensor, "b f"],
    ) -> Float[Tensor, "b f *x"]:
        """eps from a prediction of `kind` at `x_t`."""
        _check_shapes(timesteps, x_t=x_t, prediction=prediction)
        if _target(kind) == "eps":
            return prediction
        a, s = self._coefficients(timesteps, x_t)
        eps = (x_t - a * prediction) / s if kind == "x0" else s * x_t + a * prediction
        return eps.to(prediction.dtype)

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(abar), sqrt(1 - abar)) `[b, f, 1, ..]`, rounded from float64 only at the end."""
        abar = self.abar(timesteps).reshape(timesteps.shape + (1,) * (like.ndim - timesteps.ndim))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)


def _check_shapes(timesteps: Tensor, **clips: Tensor) -> None:
    """Refuse clips of different shapes, and timesteps other than one int64 per frame of theirs."""
    first = next(iter(clips.values()))
    for name, clip in clips.items():
        check_clips(name, clip)
        check_shape(name, clip, first.shape)
    check_int64("timesteps", timesteps)
    check_shape("timesteps", timesteps, first.shape[:2])


def _target(kind: str) -> Target:
    return cast(Target, choose("target", kind, TARGETS))
