"""FlashAttention kernels behind one small interface."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ardist.models.attention.cpu_kernel import CPUKernel
from ardist.models.attention.cuda_kernels import FlashAttention2Kernel, FlashAttention3Kernel, TorchCUDAKernel
from ardist.models.attention.pieces import Piece


class FlashKernel(Protocol):
    """Fused attention over one `Piece`: tokens before heads, any head dimension."""

    @property
    def name(self) -> str:
        """The name that messages and benchmarks use."""

    def missing(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why the kernel cannot run for such tensors, or None when nothing speaks against trying."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece) -> tuple[Tensor, Tensor]:
        """[b, n, h, d], [b, m, h, d] twice -> output [b, n, h, d], log-sum-exp [b, h, n] of the piece's scores."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, piece: Piece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The piece's share of the gradients of q, k, v, given output and log-sum-exp over *all* pieces."""


KERNELS: dict[str, FlashKernel] = {
    kernel.name: kernel for kernel in (FlashAttention3Kernel(), FlashAttention2Kernel(), TorchCUDAKernel(), CPUKernel())
}
"""All kernels by name, best first."""
