"""What the network is told beside the latents: a timestep per frame, a class per clip, a context sequence per clip."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

FREQUENCIES = 256


def sinusoid(timesteps: Int64[Tensor, "b f"], dim: int = FREQUENCIES) -> Float[Tensor, "b f s"]:
    """``[cos ; sin]`` of the timesteps at `dim`/2 rates from 1 down to nearly 1e-4 radians per step, in fp32."""
    half = dim // 2
    rates = torch.exp(-math.log(1e4) * torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps[..., None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear, one vector per frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(FREQUENCIES, width)
        self.output = nn.Linear(width, width)

    def forward(self, timesteps: Int64[Tensor, "b f"]) -> Float[Tensor, "b f w"]:
        """Embed timesteps in [0, T) in the dtype of the weights."""
        encoded = sinusoid(timesteps).to(self.hidden.weight.dtype)
        embedded: Tensor = self.output(nn.functional.silu(self.hidden(encoded)))
        return embedded


class ContextEmbedding(nn.Module):
    """Context tokens -> Linear, with one learned null sequence that stands for "no condition"."""

    def __init__(self, context_tokens: int, context_dim: int, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.empty(context_tokens, context_dim))
        self.projection = nn.Linear(context_dim, width)

    def forward(
        self, context: Float[Tensor, "b k d"] | None, dropped: Bool[Tensor, "b"] | None, batch_size: int
    ) -> Float[Tensor, "b k w"]:
        """Embed; clips marked in `dropped`, or all clips when `context` is None, get the null sequence."""
        if context is None:
            context = self.null.expand(batch_size, -1, -1)
        elif dropped is not None:
            context = torch.where(dropped[:, None, None], self.null, context.to(self.null.dtype))
        embedded: Tensor = self.projection(context.to(self.null.dtype))
        return embedded
