"""A tiny input for a denoiser and what it makes of it, stored with the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ardist.diffusion.counter_rng import Purpose, integers, normal
from ardist.models.denoiser import Denoiser

TOLERANCE = 1e-3
"""Relative error that another machine's rounding may cause in fp32; a wrong weight causes far more."""
_FRAMES = 2


def make_case(denoisers: Mapping[str, Denoiser], num_timesteps: int) -> dict[str, Tensor]:
    """Inputs ``input.*`` for one clip of two frames, and ``output.<kind>`` of each denoiser."""
    config = next(iter(denoisers.values())).config
    ids = torch.zeros(1, dtype=torch.int64)
    shape = (_FRAMES, config.tokens_per_frame, config.latent_channels)
    timesteps = integers(0, 0, ids, Purpose.VALIDATION, (_FRAMES,), 0, num_timesteps)
    case = {
        "input.latents": normal(0, 0, ids, Purpose.VALIDATION, shape),
        "input.timesteps": timesteps.sort(dim=1).values,
    }
    if config.context_tokens:
        case["input.context"] = normal(0, 1, ids, Purpose.VALIDATION, (config.context_tokens, config.context_dim))
    if config.num_classes is not None:
        case["input.class_ids"] = torch.zeros(1, dtype=torch.int64)
    return {**case, **{f"output.{kind}": _run(denoiser, case) for kind, denoiser in denoisers.items()}}


def worst_error(denoiser: Denoiser, case: Mapping[str, Tensor], kind: str) -> float:
    """Relative error of the denoiser's output against the stored one; nan when either is not finite."""
    expected = case[f"output.{kind}"]
    scale = expected.norm().clamp_min(1e-6)
    return float((_run(denoiser, case) - expected).norm() / scale)


@torch.no_grad()
def _run(denoiser: Denoiser, case: Mapping[str, Tensor]) -> Tensor:
    device = denoiser.input.weight.device
    arguments = {
        name.removeprefix("input."): value.to(device) for name, value in case.items() if name.startswith("input.")
    }
    out: Tensor = denoiser(**arguments)
    return out.float().cpu()
