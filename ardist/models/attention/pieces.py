"""The block-causal mask as a handful of rectangles and bands, each of which a FlashAttention kernel does natively.

FlashAttention knows full attention, bands around the diagonal (causal, sliding window) and batches of independent
blocks, but not "causal between frames, full inside a frame". That mask is the disjoint union of

- *earlier tokens*: every token sees the tokens strictly before it. This is the kernels' causal mask once queries are
  shifted by one token against keys, which is a view;
- *the rest of the frame*: inside its frame a token sees itself and the tokens after it, a band over blocks of L tokens;
- with a window: the oldest visible frame is seen only from the same token on by the first piece, so that frame's tokens
  up to and including the same token are a third piece;
- the context, where it is not simply the first block: one rectangle.

So any number of frames takes two kernel calls (three to five with a window or a released context), no pair is scored
twice or in vain, and keys and values are never repeated. The results are merged by their log-sum-exp.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ardist.models.attention.layout import AttentionLayout, LayoutKey
from ardist.models.attention.tracing import trace_time_constant


@dataclass(frozen=True)
class Blocks:
    """A sequence cut into independent attention blocks: one of `first` tokens (0: none), then `count` of `length`."""

    first: int
    length: int
    count: int


@dataclass(frozen=True)
class Piece:
    """One kernel call: a slice of the queries against a slice of the keys under a band.

    With n queries and m keys, query i sees key j iff ``i + m - n - left <= j <= i + m - n + right``: the last query is
    aligned with the last key, None is unbounded. With `blocks` (then n = m) the band holds inside each block alone.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    left: int | None = None
    right: int | None = None
    blocks: Blocks | None = None

    def mask(self) -> Bool[Tensor, "n m"]:
        """The pairs of this piece, relative to its own slices; for tests and for kernels that need a mask."""
        n, m = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        mask = band_mask(n, m, self.left, self.right, torch.device("cpu"))
        if self.blocks is not None:
            block = (torch.arange(n) - self.blocks.first).div(self.blocks.length, rounding_mode="floor").clamp(min=-1)
            mask = mask & (block[:, None] == block[None, :])
        return mask


def band_mask(n: int, m: int, left: int | None, right: int | None, device: torch.device) -> Bool[Tensor, "n m"]:
    """True where query i sees key j under the band of `Piece`."""
    distance = torch.arange(m, device=device)[None, :] - (torch.arange(n, device=device)[:, None] + (m - n))
    mask = torch.ones(n, m, dtype=torch.bool, device=device)
    if left is not None:
        mask = mask & (distance >= -left)
    if right is not None:
        mask = mask & (distance <= right)
    return mask


def pieces(layout: AttentionLayout) -> tuple[Piece, ...]:
    """The kernel calls whose union is exactly the mask of `layout`, every pair once."""
    return _constant_pieces(*layout.key())


@trace_time_constant
def _constant_pieces(*key: Any) -> tuple[Piece, ...]:
    return _pieces(key)


@functools.lru_cache(maxsize=256)
def _pieces(key_of_layout: LayoutKey) -> tuple[Piece, ...]:
    layout = AttentionLayout.from_key(key_of_layout).relative()
    context, length = layout.context_tokens, layout.tokens_per_frame
    asking, end = layout.num_context_queries, layout.num_queries
    first_frame, last_frame = layout.query_frames[0], layout.query_frames[1] - 1
    oldest, _ = layout.visible_frames(first_frame)
    windowed = layout.num_query_frames > 0 and layout.visible_frames(last_frame)[0] > oldest

    def key(frame: int) -> int:
        return context + (frame - layout.key_frames[0]) * length

    # Context queries that see exactly the context are one more block in front of the frames.
    joint = (
        asking > 0
        and layout.kind == "strict"
        and layout.num_query_frames > 1
        and length > 1
        and not windowed
        and first_frame == layout.key_frames[0]
    )
    result = []
    if asking and not joint:
        result.append(Piece((0, asking), (0, layout.num_keys if layout.kind == "released" else context)))
    if layout.num_query_frames == 0:
        return tuple(result)
    rows = (asking, end)
    if layout.kind == "bidirectional":
        return (*result, Piece(rows, (0, layout.num_keys)))

    # Where the oldest visible frame follows the context directly, both are one slice of the keys.
    adjacent = oldest == layout.key_frames[0] and not windowed
    if context and not adjacent:
        result.append(Piece(rows, (0, context)))
    low, high = (0 if adjacent else key(oldest)), key(last_frame + 1)
    if first_frame == last_frame:
        return (*result, Piece(rows, (low, high)))
    window = layout.window if windowed else None
    own = (key(first_frame), high)
    if window == 1:
        return (*result, Piece(rows, own, blocks=Blocks(0, length, layout.num_query_frames)))
    if length == 1:
        return (*result, Piece(rows, (low, high), left=None if window is None else window - 1, right=0))

    if joint:
        rows = (0, end)
        result.append(Piece(rows, (0, high), left=0, blocks=Blocks(context, length, layout.num_query_frames)))
    else:
        result.append(Piece(rows, own, left=0, blocks=Blocks(0, length, layout.num_query_frames)))
    # The very first token has nothing before it: a row without keys must not reach a kernel.
    nothing_before = joint or own[0] == low
    earlier = (rows[0] + nothing_before, end)
    if window is None:
        return (*result, Piece(earlier, (low, high - 1), right=0))
    result.append(Piece(earlier, (low, high - 1), left=(window - 1) * length - 2, right=0))
    edge = max(first_frame, oldest + window - 1)
    count = last_frame + 1 - edge
    edge_rows = (asking + (edge - first_frame) * length, end)
    edge_keys = (key(edge - window + 1), key(edge - window + 1 + count))
    return (*result, Piece(edge_rows, edge_keys, right=0, blocks=Blocks(0, length, count)))
