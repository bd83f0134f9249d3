"""The plain vision transformer that encoder and decoder share, and how its weights start.

The start matters. With small random weights the latent tokens of a new autoencoder hardly depend on the image and its
output hardly on them, so it learns the mean image first and stays there for long. Here one half of the channels
starts as "place", the other as "content": positions live in the first half, what patches and latents say in the
second; attention compares places and moves content. So from the first step a latent token tells of the patches near
its place and a patch is decoded from the latents near it. Training is free to mix the halves.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

NEIGHBOURHOOD = 0.15
"""Distance, in parts of the frame's side, over which the similarity of two starting positions falls to 0.6."""

PLASTIC = 1.3247179572447460
"""The plastic number; its powers give the evenest simple sequence of points in a square (R2)."""


class SelfAttention(nn.Module):
    """Multi-head attention of all tokens of one frame to each other."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q, k, v = rearrange(self.qkv(x), "n t (three h d) -> three n h t d", three=3, h=self.num_heads)
        y: Tensor = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)"))
        return y

    @torch.no_grad()
    def start_by_place(self) -> None:
        """Compare places (with equal queries and keys: near ones attract), read content, write content."""
        half = self.out.in_features // 2
        query, key, value = self.qkv.weight.chunk(3)
        for weight, unread in ((query, slice(half, None)), (value, slice(half))):
            weight[:, unread] = 0.0
            weight.mul_(math.sqrt(2))
        key.copy_(query)
        self.out.weight[:half] = 0.0


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
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


def transformer_layers(width: int, depth: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    """`depth` layers; what a layer adds starts smaller the more layers there are."""
    layers = nn.ModuleList(TransformerLayer(width, num_heads, mlp_ratio) for _ in range(depth))
    layers.apply(init_weights)
    with torch.no_grad():
        for layer in layers:
            assert isinstance(layer, TransformerLayer)
            layer.attention.start_by_place()
            layer.mlp.get_parameter("2.weight").mul_(0.25 * depth**-0.5)
    return layers


def init_weights(module: nn.Module) -> None:
    """Weights that keep the scale of their input, and zero biases, for linear layers and convolutions."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=math.prod(module.weight.shape[1:]) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def learned_tokens(count: int, width: int, std: float = 0.1) -> nn.Parameter:
    """`count` learned vectors, by default small beside the positions that are added to them."""
    return nn.Parameter(torch.randn(count, width) * std)


def learned_positions(side: int, num_latents: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Position tables of `side` x `side` patches and of `num_latents` latent tokens spread over the same square.

    Two positions start the more alike the nearer their places are (random Fourier features of a Gaussian kernel, in
    the first half of the channels).
    """
    cells = (torch.arange(side) + 0.5) / side
    places = torch.arange(1, num_latents + 1)[:, None] / PLASTIC ** torch.arange(1, 3)
    half = width // 2
    rates = torch.randn(2, half) / NEIGHBOURHOOD
    phases = torch.rand(half) * 2 * math.pi
    patches, latents = (
        nn.Parameter(F.pad(math.sqrt(2) * torch.cos(points @ rates + phases), (0, width - half)))
        for points in (torch.cartesian_prod(cells, cells), (places + 0.5) % 1)
    )
    return patches, latents


def grid_positions(
    table: Float[Tensor, "cells d"], trained: tuple[int, int], wanted: tuple[int, int]
) -> Float[Tensor, "wanted_cells d"]:
    """The learned position table of a grid of patches, resampled (bicubic) for a grid of another size."""
    if trained == wanted:
        return table
    grid = rearrange(table, "(h w) d -> 1 d h w", h=trained[0], w=trained[1])
    grid = F.interpolate(grid.float(), size=wanted, mode="bicubic", align_corners=False)
    return rearrange(grid, "1 d h w -> (h w) d").to(table.dtype)
