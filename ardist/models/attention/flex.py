"""FlexAttention: one compiled kernel that skips the blocks of the mask that are empty.

The block mask is built once per layout and device. On CPU FlexAttention has no backward pass, so it serves inference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ardist.models.attention.layout import AttentionLayout

BLOCK_TOKENS = 128


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], layout: AttentionLayout
) -> Float[Tensor, "b h n d"]:
    """Attention through FlexAttention, compiled unless a compiler is already tracing."""
    mask = block_mask(layout, q.device)
    if torch.compiler.is_compiling():
        return _out(flex_attention(q, k, v, block_mask=mask))
    if not torch.is_grad_enabled():
        # On CPU the kernel refuses tensors that merely could require a gradient.
        q, k, v = q.detach(), k.detach(), v.detach()
    return _out(_compiled()(q, k, v, block_mask=mask))


def _out(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


@functools.lru_cache(maxsize=64)
def block_mask(layout: AttentionLayout, device: torch.device) -> BlockMask:
    """Which blocks of 128 queries x 128 keys are empty, partly or fully visible; never the whole mask at once."""
    with torch.inference_mode(False), torch.no_grad():
        rows = -(-layout.num_queries // BLOCK_TOKENS)
        columns = -(-layout.num_keys // BLOCK_TOKENS)
        some = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        every = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        key = torch.arange(columns * BLOCK_TOKENS, device=device)
        for row in range(rows):
            query = torch.arange(row * BLOCK_TOKENS, (row + 1) * BLOCK_TOKENS, device=device)
            inside = (query[:, None] < layout.num_queries) & (key[None, :] < layout.num_keys)
            seen = (layout.allowed(query[:, None], key[None, :]) & inside).unflatten(1, (columns, BLOCK_TOKENS))
            some[row], every[row] = seen.any(2).any(0), seen.all(2).all(0)
        partial_count, partial_index = _ordered(some & ~every)
        full_count, full_index = _ordered(every)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return layout.allowed(query, key)

    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=visible,
        seq_lengths=(layout.num_queries, layout.num_keys),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the number of marked columns, and all columns, marked ones first: int32 [1, 1, r], [1, 1, r, c]."""
    marked = blocks.to(torch.int32)
    index = torch.argsort(marked, dim=1, descending=True, stable=True).to(torch.int32)
    return marked.sum(1, dtype=torch.int32)[None, None], index.contiguous()[None, None]
