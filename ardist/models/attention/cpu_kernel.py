"""PyTorch's CPU flash kernel as a provider: what the decomposition is tested with on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ardist.models.attention.kernels import FlashKernel
from ardist.models.attention.pieces import Blocks, Piece, band_mask


class CPUKernel(FlashKernel):
    """fp64 to bf16 on CPU. A band other than causal becomes a mask: what it excludes is computed and discarded, which
    is why ``auto`` prefers ``sdpa`` on CPU."""

    name = "cpu"

    def missing(self, device_type: str, dtype: torch.dtype) -> str | None:
        """It runs on CPU only."""
        return None if device_type == "cpu" else f"it runs on cpu, not on {device_type}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece) -> tuple[Tensor, Tensor]:
        """See `FlashKernel`."""
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        parts = []
        for tensors in zip(*(_groups(x, piece.blocks) for x in (q, k, v)), strict=True):
            causal, mask = _band(tensors[0], tensors[1], piece)
            parts.append(run(*(x.transpose(1, 2) for x in tensors), 0.0, causal, attn_mask=mask, scale=scale))
        out = torch.cat([_ungroup(part[0], q.shape[0]) for part in parts], dim=1)
        lse = torch.cat([_ungroup(part[1], q.shape[0]) for part in parts], dim=1)
        return out, lse.transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, piece: Piece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashKernel`."""
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        parts = []
        for tensors in zip(*(_groups(x, piece.blocks) for x in (grad, q, k, v, out, lse.transpose(1, 2))), strict=True):
            causal, mask = _band(tensors[1], tensors[2], piece)
            parts.append(run(*(x.transpose(1, 2) for x in tensors), 0.0, causal, attn_mask=mask, scale=scale))
        dq, dk, dv = (torch.cat([_ungroup(part[i], q.shape[0]) for part in parts], dim=1) for i in range(3))
        return dq, dk, dv


def _groups(x: Tensor, blocks: Blocks | None) -> list[Tensor]:
    """[b, n, ...] as batches of blocks of one length: the odd first block, then the rest as [b·count, length, ...]."""
    if blocks is None:
        return [x]
    rest = x[:, blocks.first :].unflatten(1, (blocks.count, blocks.length)).flatten(0, 1)
    return [x[:, : blocks.first], rest] if blocks.first else [rest]


def _ungroup(x: Tensor, batch: int) -> Tensor:
    """The kernel's [b·count, h, length, ...] back to [b, count·length, h, ...]."""
    rows: Tensor = x.transpose(1, 2).unflatten(0, (batch, -1))
    return rows.flatten(1, 2)


def _band(q: Tensor, k: Tensor, piece: Piece) -> tuple[bool, Tensor | None]:
    """The band in the kernel's terms: a causal flag, or an additive mask."""
    n, m = q.shape[1], k.shape[1]
    if piece.left is None and piece.right is None:
        return False, None
    if piece.left is None and piece.right == 0 and n == m:
        return True, None
    seen = band_mask(n, m, piece.left, piece.right, q.device)
    return False, torch.zeros(n, m, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
