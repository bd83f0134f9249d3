"""The plain vision transformer that encoder and decoder share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

INIT_STD = 0.02


def init_weights(module: nn.Module) -> None:
    """Truncated normal weights and zero biases for linear layers and patch convolutions."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SelfAttention(nn.Module):
    """Multi-head attention of all tokens of one frame to each other."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q, k, v = rearrange(self.qkv(x), "n t (three h d) -> three n h t d", three=3, h=self.num_heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)"))  # type: ignore[no-any-return]


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def learned_tokens(count: int, width: int) -> nn.Parameter:
    """`count` learned vectors of about unit length."""
    return nn.Parameter(torch.randn(count, width) * width**-0.5)


def grid_positions(
    table: Float[Tensor, "cells d"], trained: tuple[int, int], wanted: tuple[int, int]
) -> Float[Tensor, "wanted_cells d"]:
    """The learned position table of a grid of patches, resampled (bicubic) for a grid of another size."""
    if trained == wanted:
        return table
    grid = rearrange(table, "(h w) d -> 1 d h w", h=trained[0], w=trained[1])
    grid = F.interpolate(grid.float(), size=wanted, mode="bicubic", align_corners=False)
    return rearrange(grid, "1 d h w -> (h w) d").to(table.dtype)
