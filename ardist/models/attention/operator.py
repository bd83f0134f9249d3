"""Attention as one operator of PyTorch's: what a compiler sees of a block's attention, and what autograd records.

A compiler would have to unroll the plan of chunks and pieces into its graph, and so to compile anew for every number
of frames. Behind an operator it sees one call with symbolic sizes instead: a whole block is one graph, and that graph
serves every number of frames and clips. The backward pass is a second operator. It starts from the log-sum-exp that
the first one returns, so nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ardist.models.attention import flash, merging, sdpa, sdpa_cpu
from ardist.models.attention.layout import AttentionLayout

_ARGUMENTS = "SymInt[] sizes, str kind, str backend"


def serves(backend: str, device_type: str) -> bool:
    """Whether `backend` runs behind the operator; others are plain differentiable operations, traced as they are."""
    return backend == "flash" or (backend == "sdpa" and device_type == "cpu")


def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: str) -> Tensor:
    """[b, h, n, d] and twice [b, h, m, d] -> [b, h, n, d], differentiable once."""
    sizes = [
        layout.tokens_per_frame,
        *layout.query_frames,
        *layout.key_frames,
        layout.context_tokens,
        int(layout.context_queries),
        0 if layout.window is None else layout.window,
    ]
    out: Tensor
    out, _ = torch.ops.ardist.attention(q, k, v, sizes, layout.kind, backend)
    return out.transpose(1, 2)


def attend_directly(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: str) -> Tensor:
    """The same without the operator, for eager inference: no gradients, no overhead."""
    out, _ = _run(q, k, v, layout, backend, sdpa.CHUNK_TOKENS_INFERENCE)
    return out.transpose(1, 2)


def _run(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: str, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    if backend == "sdpa":
        return sdpa_cpu.forward(q, k, v, layout, chunk_tokens)
    kernel = flash.KERNELS[flash.select(q.device.type, q.dtype, q.shape[-1])]
    return merging.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layout, kernel)


def _layout(sizes: Sequence[int], kind: str) -> AttentionLayout:
    length, first, last, start, stop, context, asking, window = sizes
    return AttentionLayout(length, (first, last), (start, stop), context, bool(asking), kind, window or None)


@torch.library.custom_op(
    "ardist::attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _attention(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], kind: str, backend: str) -> tuple[Tensor, Tensor]:
    """Output [b, n, h, d] and log-sum-exp [b, h, n], contiguous."""
    out, lse = _run(q, k, v, _layout(sizes, kind), backend, sdpa.CHUNK_TOKENS_TRAINING)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], kind: str, backend: str) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(batch, tokens, heads, dim), lse


@torch.library.custom_op(
    "ardist::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sizes: Sequence[int],
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v as contiguous [b, n or m, h, d]; `grad` and `out` are [b, n, h, d]."""
    layout = _layout(sizes, kind)
    if backend == "sdpa":
        return sdpa_cpu.backward(grad, q, k, v, out, lse, layout, sdpa.CHUNK_TOKENS_TRAINING)
    kernel = flash.KERNELS[flash.select(q.device.type, q.dtype, q.shape[-1])]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    dq, dk, dv = (x.contiguous() for x in merging.backward(grad, q, k, v, out, lse, layout, kernel))
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sizes: Sequence[int],
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.sizes, ctx.kind, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.ardist.attention_backward(grad, *ctx.saved_tensors, ctx.sizes, ctx.kind, ctx.backend)
    return (*(x.transpose(1, 2) for x in gradients), None, None, None)


_attention.register_autograd(_gradients, setup_context=_keep)
