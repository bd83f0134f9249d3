"""The sdpa backend on a CPU: the same chunks of frames, through PyTorch's fused CPU kernel and its backward kernel.

The kernel also returns the log-sum-exp of the scores. With it the backward pass goes through the chunks by itself, into
one gradient buffer each for keys and values: left to autograd, every slice of a chunk would become a zero-filled
tensor as long as the whole sequence.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ardist.models.attention import sdpa
from ardist.models.attention.layout import AttentionLayout


def forward(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """[b, h, n, d] and twice [b, h, m, d] -> output [b, n, h, d] and log-sum-exp [b, h, n], both contiguous."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (_dense_channels(x) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    out = lse = None
    for call, mask in _calls(layout, chunk_tokens, q.dtype):
        rows = slice(*call.queries)
        part, part_lse = run(
            q[:, :, rows], sdpa.keys_of(k, call), sdpa.keys_of(v, call), 0.0, False, attn_mask=mask, scale=scale
        )
        if call.queries == (0, q.shape[2]):
            return part.transpose(1, 2).contiguous(), part_lse.contiguous()
        if out is None or lse is None:
            out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
            lse = part_lse.new_empty(q.shape[:3])
        out[:, rows] = part.transpose(1, 2)
        lse[:, :, rows] = part_lse
    assert out is not None
    assert lse is not None
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: AttentionLayout, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v as contiguous [b, n or m, h, d]; `grad` and `out` are [b, n, h, d]."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad, q, k, v = (_dense_channels(x) for x in (grad.transpose(1, 2), q, k, v))
    out, scale = out.transpose(1, 2), q.shape[-1] ** -0.5
    calls = _calls(layout, chunk_tokens, q.dtype)
    if len(calls) == 1 and calls[0][0].keys == (0, k.shape[2]):
        dq, dk, dv = run(grad, q, k, v, out, lse, 0.0, False, attn_mask=calls[0][1], scale=scale)
        return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()
    dq, dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
    for call, mask in calls:
        rows = slice(*call.queries)
        parts = run(
            grad[:, :, rows],
            q[:, :, rows],
            sdpa.keys_of(k, call),
            sdpa.keys_of(v, call),
            out[:, :, rows],
            lse[:, :, rows],
            0.0,
            False,
            attn_mask=mask,
            scale=scale,
        )
        dq[:, rows] = parts[0].transpose(1, 2)
        for total, part in ((dk, parts[1]), (dv, parts[2])):
            by_token = part.transpose(1, 2)
            if call.context:
                total[:, : call.context] += by_token[:, : call.context]
            total[:, slice(*call.keys)] += by_token[:, call.context :]
    return dq, dk, dv


def _calls(
    layout: AttentionLayout, chunk_tokens: int, dtype: torch.dtype
) -> tuple[tuple[sdpa.Call, Tensor | None], ...]:
    return _cached_calls(layout, chunk_tokens, sdpa.ONE_CALL_TOKENS, dtype)


@functools.lru_cache(maxsize=256)
def _cached_calls(
    layout: AttentionLayout, chunk_tokens: int, one_call_tokens: int, dtype: torch.dtype
) -> tuple[tuple[sdpa.Call, Tensor | None], ...]:
    """The calls of a layout with the masks as the kernel wants them: added to the scores."""
    calls = sdpa.plan(chunk_tokens, layout)
    return tuple(
        (call, None if call.mask is None else _added(call.mask, dtype)[:, call.mask_start :]) for call in calls
    )


@functools.lru_cache(maxsize=64)
def _added(layout: AttentionLayout, dtype: torch.dtype) -> Tensor:
    # A tensor born in inference mode could not take part in a later training step.
    with torch.inference_mode(False):
        seen = layout.dense_mask()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
