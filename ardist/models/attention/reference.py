"""The oracle: masked softmax attention written out in full, in fp64 when its inputs are fp64."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ardist.models.attention.layout import AttentionLayout


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], layout: AttentionLayout
) -> Float[Tensor, "b h n d"]:
    """``softmax(q kᵀ / sqrt(d) + mask) v`` through the dense [n, m] mask; half precision is computed in fp32."""
    working = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(working) @ k.to(working).mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~layout.dense_mask(q.device), float("-inf"))
    out: Tensor = scores.softmax(-1) @ v.to(working)
    return out.to(q.dtype)
