"""The portable backend: PyTorch's fused attention, called over chunks of frames, each with the keys it may see.

A chunk is one frame when frames are large; its keys are then one contiguous slice, no mask exists and no forbidden pair
is scored. Small frames are grouped, because a call costs more than the few pairs it would save: only such a chunk needs
a mask, and the mask is as tall as the chunk. Plain differentiable operations throughout, so every device and compiler
can run it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ardist.models.attention.layout import AttentionLayout, LayoutKey
from ardist.models.attention.tracing import trace_time_constant

# Measured on one x86-64 core (fp32, head dims 32 and 64, frames of 1 to 64 tokens): with gradients chunks of 64 tokens
# are fastest, because each slice of k and v costs a zero-filled gradient; without gradients 32 tokens suffice. A whole
# sequence of up to 96 queries is fastest as one masked call.
CHUNK_TOKENS_TRAINING = 64
CHUNK_TOKENS_INFERENCE = 32
ONE_CALL_TOKENS = 96


@dataclass(frozen=True)
class Call:
    """One attention call: token ranges of its queries and keys, and its mask if it needs one."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    context: int = 0
    """The first so many keys come before `keys` (a window lies between the two)."""
    mask: AttentionLayout | None = None
    """The mask, without its first `mask_start` columns."""
    mask_start: int = 0


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], layout: AttentionLayout
) -> Float[Tensor, "b h n d"]:
    """Attention in chunks of frames; exact, any dtype, any device."""
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chunk_tokens = CHUNK_TOKENS_TRAINING if tracked else CHUNK_TOKENS_INFERENCE
    key = layout.key()
    outputs = []
    for index, call in enumerate(_plan(chunk_tokens, *key)):
        queries = q[:, :, call.queries[0] : call.queries[1]]
        mask = None if call.mask is None else _mask(q.device, index, chunk_tokens, *key)[:, call.mask_start :]
        outputs.append(F.scaled_dot_product_attention(queries, keys_of(k, call), keys_of(v, call), attn_mask=mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def plan(chunk_tokens: int, layout: AttentionLayout) -> tuple[Call, ...]:
    """The attention calls of a layout, in chunks of about `chunk_tokens` queries."""
    return _cached_plan(chunk_tokens, layout.key())


def keys_of(x: Tensor, call: Call) -> Tensor:
    """The keys or values [b, h, m, d] that a call needs; a view, unless a window parts context and frames."""
    keys = x[:, :, call.keys[0] : call.keys[1]]
    return torch.cat([x[:, :, : call.context], keys], dim=2) if call.context else keys


@trace_time_constant
def _plan(chunk_tokens: int, *key: Any) -> tuple[Call, ...]:
    return _cached_plan(chunk_tokens, key)


@trace_time_constant
def _mask(device: torch.device, index: int, chunk_tokens: int, *key: Any) -> Tensor:
    """The mask of call `index`; calls alike share it."""
    layout = _plan(chunk_tokens, *key)[index].mask
    assert layout is not None
    return _cached_mask(layout, device)


@functools.lru_cache(maxsize=1024)
def _cached_plan(chunk_tokens: int, key: LayoutKey) -> tuple[Call, ...]:
    layout = AttentionLayout.from_key(key).relative()
    whole = Call((0, layout.num_queries), (0, layout.num_keys))
    if layout.num_pairs() == layout.num_queries * layout.num_keys:
        return (whole,)
    if layout.num_queries <= ONE_CALL_TOKENS and layout.num_keys <= 2 * ONE_CALL_TOKENS:
        return (Call(whole.queries, whole.keys, mask=layout),)
    calls = []
    asking = layout.num_context_queries
    if asking:
        calls.append(Call((0, asking), (0, layout.num_keys if layout.kind == "released" else layout.context_tokens)))
    first, last = layout.query_frames
    per_chunk = max(1, chunk_tokens // layout.tokens_per_frame)
    if layout.kind == "bidirectional":
        per_chunk = max(1, last - first)
    calls += [_chunk(layout, start, min(last, start + per_chunk)) for start in range(first, last, per_chunk)]
    return tuple(calls)


def _chunk(layout: AttentionLayout, start: int, stop: int) -> Call:
    """The call for the frames [start, stop) of a layout whose frames are counted from its first key."""
    context, length = layout.context_tokens, layout.tokens_per_frame
    offset = layout.num_context_queries - layout.query_frames[0] * length
    queries = (offset + start * length, offset + stop * length)
    oldest, newest = layout.visible_frames(start)[0], layout.visible_frames(stop - 1)[1]
    keys = (context + oldest * length, context + newest * length)
    front = context
    if oldest == 0:
        keys, front = (0, keys[1]), 0
    if layout.visible_frames(start) == layout.visible_frames(stop - 1):
        return Call(queries, keys, front)
    # Masks of a window depend on the distance of frames alone. Without a window all frames before the chunk are
    # visible, so the mask of the longest such chunk serves all of them from some column on.
    newest_of_all = layout.query_frames[1] if layout.window is None else newest - oldest
    rows = (newest_of_all - (stop - start), newest_of_all)
    mask = AttentionLayout(length, rows, (0, newest_of_all), context, context_queries=False, window=layout.window)
    return Call(queries, keys, front, mask, (newest_of_all - newest) * length if layout.window is None else 0)


@functools.lru_cache(maxsize=64)
def _cached_mask(layout: AttentionLayout, device: torch.device) -> Tensor:
    # A tensor born in inference mode could not take part in a later training step.
    with torch.inference_mode(False):
        return layout.dense_mask(device)
