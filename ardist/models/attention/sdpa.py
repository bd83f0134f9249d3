"""The portable backend: PyTorch's fused attention, called over chunks of frames so that no forbidden pair is scored.

A chunk is one frame when frames are large; its keys are then one contiguous slice and no mask exists at all. Small
frames are grouped, because a call costs more than the few pairs it would save: only such a chunk needs a mask, and the
mask is as tall as the chunk. Plain differentiable operations throughout, so every device and compiler can run it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ardist.models.attention.layout import AttentionLayout

# Measured on one x86-64 core (fp32, head dims 32 and 64, frames of 1 to 64 tokens): with gradients chunks of 64 tokens
# are fastest, because each slice of k and v costs a zero-filled gradient; without gradients 32 tokens suffice. A whole
# sequence of up to 96 queries is fastest as one masked call.
CHUNK_TOKENS_TRAINING = 64
CHUNK_TOKENS_INFERENCE = 32
ONE_CALL_TOKENS = 96


@dataclass(frozen=True)
class _Chunk:
    """Consecutive frames that are attended in one call, and the key frames that any of them sees."""

    frames: tuple[int, int]
    key_frames: tuple[int, int]


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], layout: AttentionLayout
) -> Float[Tensor, "b h n d"]:
    """Attention in chunks of frames; exact, any dtype, any device."""
    if layout.num_queries <= ONE_CALL_TOKENS and layout.num_keys <= 2 * ONE_CALL_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(layout, q.device))
    outputs = []
    if layout.num_context_queries:
        seen = layout.num_keys if layout.kind == "released" else layout.context_tokens
        context = q[:, :, : layout.num_context_queries]
        outputs.append(F.scaled_dot_product_attention(context, k[:, :, :seen], v[:, :, :seen]))
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chunk_tokens = CHUNK_TOKENS_TRAINING if tracked else CHUNK_TOKENS_INFERENCE
    for chunk in _chunks(layout, max(1, chunk_tokens // layout.tokens_per_frame)):
        rows = q[:, :, _query_slice(layout, chunk.frames)]
        keys, values = (_visible(x, layout, chunk.key_frames) for x in (k, v))
        mask = _chunk_mask(layout, chunk, q.device)
        outputs.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _chunks(layout: AttentionLayout, frames_per_chunk: int) -> Iterator[_Chunk]:
    first, last = layout.query_frames
    if layout.kind == "bidirectional" and first < last:
        # Every frame sees the same keys: one call.
        yield _Chunk((first, last), layout.key_frames)
        return
    for start in range(first, last, frames_per_chunk):
        stop = min(last, start + frames_per_chunk)
        yield _Chunk((start, stop), (layout.visible_frames(start)[0], layout.visible_frames(stop - 1)[1]))


def _query_slice(layout: AttentionLayout, frames: tuple[int, int]) -> slice:
    start, stop = (layout.num_context_queries + (f - layout.query_frames[0]) * layout.tokens_per_frame for f in frames)
    return slice(start, stop)


def _visible(x: Tensor, layout: AttentionLayout, frames: tuple[int, int]) -> Tensor:
    """The context and the given frames of k or v; a view unless a window lies between the two."""
    start, stop = (layout.context_tokens + (f - layout.key_frames[0]) * layout.tokens_per_frame for f in frames)
    if start == layout.context_tokens:
        return x[:, :, :stop]
    if not layout.context_tokens:
        return x[:, :, start:stop]
    return torch.cat([x[:, :, : layout.context_tokens], x[:, :, start:stop]], dim=2)


def _chunk_mask(layout: AttentionLayout, chunk: _Chunk, device: torch.device) -> Bool[Tensor, "n m"] | None:
    """The mask inside one chunk, or None where every query of the chunk sees every one of its keys."""
    start, stop = chunk.frames
    key_start, key_stop = chunk.key_frames
    if layout.kind == "bidirectional" or layout.visible_frames(start) == layout.visible_frames(stop - 1):
        return None
    if layout.window is None:
        # Before the chunk everything is visible, so the longest chunk's mask, aligned to the right, serves all of them.
        per_chunk = stop - start
        longest = layout.query_frames[1] - layout.key_frames[0]
        mask = _mask(_sub_layout(layout, longest - per_chunk, longest, 0), device)
        assert mask is not None, "several frames in one chunk do not all see the same keys"
        return mask[:, (longest - key_stop + layout.key_frames[0]) * layout.tokens_per_frame :]
    return _mask(_sub_layout(layout, start - key_start, stop - key_start, 0), device)


def _sub_layout(layout: AttentionLayout, start: int, stop: int, key_start: int) -> AttentionLayout:
    """One chunk as a layout of its own, frames counted from its first key, so that chunks alike share one mask."""
    return AttentionLayout(
        layout.tokens_per_frame,
        (start, stop),
        (key_start, stop),
        layout.context_tokens,
        context_queries=False,
        window=layout.window,
    )


def _mask(layout: AttentionLayout, device: torch.device) -> Bool[Tensor, "n m"] | None:
    if layout.num_pairs() == layout.num_queries * layout.num_keys:
        return None
    if torch.compiler.is_compiling():
        return layout.dense_mask(device)
    return _cached_mask(layout, device)


@functools.lru_cache(maxsize=64)
def _cached_mask(layout: AttentionLayout, device: torch.device) -> Tensor:
    # A tensor born in inference mode could not take part in a later training step.
    with torch.inference_mode(False):
        return layout.dense_mask(device)
