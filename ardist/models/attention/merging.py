"""FlashAttention for the block-causal mask: exact, by merging kernel calls that never score a forbidden pair.

Each call of `pieces` returns its output and the log-sum-exp of its scores. With ``lse = log Σ exp(lse_i)`` over the
calls a query takes part in, the merged output is ``Σ exp(lse_i - lse) out_i``. The backward pass hands the *merged*
output and log-sum-exp to each call's backward kernel, which then reconstructs the true softmax weights of its own
pairs; the gradients of the calls simply add up, as in ring attention.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ardist.models.attention.kernels import FlashKernel
from ardist.models.attention.layout import AttentionLayout
from ardist.models.attention.pieces import Piece, pieces


def block_causal(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    layout: AttentionLayout,
    kernel: FlashKernel,
) -> Float[Tensor, "b h n d"]:
    """Attention under the mask of `layout`, differentiable once, with every pair scored by `kernel`."""
    # Kernels want tokens before heads; these are views.
    out: Tensor = _BlockCausal.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layout, kernel)
    return out.transpose(1, 2)


class _BlockCausal(torch.autograd.Function):
    """[b, n, h, d] queries and [b, m, h, d] keys and values to [b, n, h, d] outputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kernel: FlashKernel) -> Tensor:
        out, lse = forward(q, k, v, layout, kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.kernel = layout, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return (*backward(grad, q, k, v, out, lse, ctx.layout, ctx.kernel), None, None)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, kernel: FlashKernel) -> tuple[Tensor, Tensor]:
    """[b, n, h, d] queries and [b, m, h, d] keys and values to outputs [b, n, h, d] and log-sum-exp [b, h, n]."""
    scale = q.shape[-1] ** -0.5
    calls = pieces(layout)
    parts = [kernel.forward(_rows(q, c.queries), _rows(k, c.keys), _rows(v, c.keys), scale, c) for c in calls]
    return _merge(calls, parts, q)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: AttentionLayout,
    kernel: FlashKernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their shapes, from what `forward` was given and returned."""
    scale = q.shape[-1] ** -0.5
    totals: list[Tensor | None] = [None, None, None]
    for c in pieces(layout):
        parts = kernel.backward(
            _rows(grad, c.queries),
            _rows(q, c.queries),
            _rows(k, c.keys),
            _rows(v, c.keys),
            _rows(out, c.queries),
            lse[:, :, c.queries[0] : c.queries[1]].contiguous(),
            scale,
            c,
        )
        for i, (whole, where, part) in enumerate(zip((q, k, v), (c.queries, c.keys, c.keys), parts, strict=True)):
            totals[i] = _add(totals[i], whole, where, part)
    # Keys that no query sees at all belong to no piece.
    dq, dk, dv = (torch.zeros_like(x) if total is None else total for total, x in zip(totals, (q, k, v), strict=True))
    return dq, dk, dv


def _rows(x: Tensor, where: tuple[int, int]) -> Tensor:
    return x[:, where[0] : where[1]]


def _add(total: Tensor | None, whole: Tensor, where: tuple[int, int], part: Tensor) -> Tensor:
    """Add a part's gradient; the first part is taken as it is when it covers everything."""
    if total is None:
        if where == (0, whole.shape[1]):
            return part
        total = torch.zeros(whole.shape, dtype=whole.dtype, device=whole.device)
    _rows(total, where).add_(part)
    return total


def _merge(calls: tuple[Piece, ...], parts: list[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    """Combine outputs [b, n_i, h, d] and log-sum-exps [b, h, n_i] of the calls into those of all their pairs."""
    if len(parts) == 1:
        return parts[0]
    batch, tokens, heads, _ = q.shape
    working = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((batch, heads, tokens), float("-inf"), dtype=working, device=q.device)
    for call, (_, part_lse) in zip(calls, parts, strict=True):
        rows = lse[:, :, call.queries[0] : call.queries[1]]
        rows.copy_(torch.logaddexp(rows, part_lse))
    out = torch.zeros(q.shape, dtype=working, device=q.device)
    for call, (part, part_lse) in zip(calls, parts, strict=True):
        weight = (part_lse - lse[:, :, call.queries[0] : call.queries[1]]).exp()
        _rows(out, call.queries).add_(part * weight.transpose(1, 2).unsqueeze(-1))
    return out.to(q.dtype), lse
