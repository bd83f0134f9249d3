"""The interface behind which every FlashAttention kernel stands."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from ardist.models.attention.pieces import Piece


class FlashKernel(abc.ABC):
    """Fused attention over one `Piece`: tokens before heads, any head dimension."""

    name: str
    """How messages, benchmarks and `available_backends` call it."""

    @abc.abstractmethod
    def missing(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why the kernel cannot run for such tensors, or None when nothing speaks against trying."""

    @abc.abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece) -> tuple[Tensor, Tensor]:
        """[b, n, h, d] and twice [b, m, h, d] -> output [b, n, h, d] and log-sum-exp [b, h, n] of the scores."""

    @abc.abstractmethod
    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, piece: Piece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The piece's share of the gradients of q, k, v, given output and log-sum-exp over *all* pieces."""
