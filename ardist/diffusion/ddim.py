"""Deterministic DDIM steps with one noise level per frame, and classifier-free guidance.

Source: Song et al. (2021), eta = 0; AR-Diffusion (arXiv 2503.07418), "Asynchronous video generation".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ardist.diffusion.shapes import check_clips, check_shape


def ddim_step(
    x_t: Float[Tensor, "b f *x"],
    x0: Float[Tensor, "b f *x"],
    abar_t: Float[Tensor, "b f"] | Float[Tensor, " f"],
    abar_prev: Float[Tensor, "b f"] | Float[Tensor, " f"],
    *,
    updated: Bool[Tensor, "b f"] | Bool[Tensor, " f"] | None = None,
) -> Float[Tensor, "b f *x"]:
    """`x_t` moved from noise level `abar_t` to `abar_prev`, along the noise that the prediction `x0` implies.

    Levels are inside (0, 1), one per frame, and are best given in float64; after a frame's last evaluation `abar_prev`
    is abar_0. Frames that are not `updated` (default: all are) come back bit-identical. Computed in float32 (float64
    for float64 input), returned in the dtype of `x_t`. Raises InvalidValueError for tensors that would only fit by
    broadcasting.
    """
    check_clips("x_t", x_t)
    check_shape("x0", x0, x_t.shape)
    for name, values in (("abar_t", abar_t), ("abar_prev", abar_prev), ("updated", updated)):
        if values is not None:
            check_shape(name, values, x_t.shape[:2], x_t.shape[1:2])
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    trailing = (1,) * (x_t.ndim - 2)
    abar, prev = (level.double().reshape(level.shape + trailing) for level in (abar_t, abar_prev))
    # x_prev = sqrt(prev) x0 + sqrt(1-prev) (x_t - sqrt(abar) x0) / sqrt(1-abar), sorted by x_t and x0.
    keep = ((1 - prev) / (1 - abar)).sqrt()
    pull = prev.sqrt() - keep * abar.sqrt()
    moved = (keep.to(dtype) * x_t + pull.to(dtype) * x0).to(x_t.dtype)
    return moved if updated is None else torch.where(updated.reshape(updated.shape + trailing), moved, x_t)


def guide(
    conditional: Float[Tensor, "*x"], unconditional: Float[Tensor, "*x"], guidance_scale: float | int
) -> Float[Tensor, "*x"]:
    """Classifier-free guidance: unconditional + guidance_scale (conditional - unconditional); a scale of 1 is off."""
    return unconditional + guidance_scale * (conditional - unconditional)
