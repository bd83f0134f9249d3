"""FlexAttention: one compiled kernel that skips the empty blocks of the mask.

The block mask is built once per layout and device. On CPU FlexAttention has no backward pass, so it serves inference.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ardist.errors import InvalidValueError
from ardist.models.attention.layout import AttentionLayout
from ardist.models.attention.tracing import trace_time_constant

BLOCK_TOKENS = 128
COMPILED_LAYOUTS = 64


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], layout: AttentionLayout
) -> Float[Tensor, "b h n d"]:
    """Attention through FlexAttention, compiled here unless a compiler is already tracing.

    Raises:
        InvalidValueError: more layouts and shapes were compiled than the compiler allows.
    """
    if torch.compiler.is_compiling():
        out: Tensor = flex_attention(q, k, v, block_mask=_assemble(layout, _constant_tables(q.device, *layout.key())))
        return out
    if not torch.is_grad_enabled():
        # On CPU the kernel refuses tensors that merely could require a gradient.
        q, k, v = q.detach(), k.detach(), v.detach()
    try:
        out = _compiled()(q, k, v, block_mask=block_mask(layout.relative(), q.device))
    except FailOnRecompileLimitHit as problem:
        raise InvalidValueError(
            "FlexAttention is compiled anew for each layout and shape, and the compiler's limit on that is reached; "
            "legal attention backends for many layouts: auto, sdpa, flash"
        ) from problem
    return out


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Each layout compiles anew. Past the limit the compiler would quietly fall back to a dense computation, so it is
    # set wide where it can be, and `fullgraph` turns what lies beyond it into an error.
    wide = "recompile_limit" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"recompile_limit": COMPILED_LAYOUTS} if wide else {}
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True, **options)
    return compiled


@functools.lru_cache(maxsize=COMPILED_LAYOUTS)
def block_mask(layout: AttentionLayout, device: torch.device) -> BlockMask:
    """Which blocks of 128 queries x 128 keys are empty, partly or fully visible."""
    with torch.inference_mode(False), torch.no_grad():
        return _assemble(layout, _tables(layout, device))


def _assemble(layout: AttentionLayout, tables: tuple[Tensor, ...]) -> BlockMask:
    partial, every, partial_back, every_back = zip(tables[::2], tables[1::2], strict=True)
    return BlockMask(
        (layout.num_queries, layout.num_keys),
        *partial,
        *every,
        *partial_back,
        *every_back,
        BLOCK_SIZE=(BLOCK_TOKENS, BLOCK_TOKENS),
        mask_mod=lambda batch, head, query, key: layout.allowed(query, key),
    )


@trace_time_constant
def _constant_tables(device: torch.device, *key: Any) -> tuple[Tensor, ...]:
    return _tables(AttentionLayout.from_key(key).relative(), device)


@functools.lru_cache(maxsize=COMPILED_LAYOUTS)
def _tables(layout: AttentionLayout, device: torch.device) -> tuple[Tensor, ...]:
    """The eight tables of a block mask, without ever holding the whole mask.

    Counts and indices of the partly visible key blocks of each query block, those of the fully visible ones, and the
    same from the side of the key blocks, which the backward pass walks through.
    """
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
        partial = some & ~every
        return *_ordered(partial), *_ordered(every), *_ordered(partial.T), *_ordered(every.T)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the number of marked columns, and all columns, marked ones first: int32 [1, 1, r], [1, 1, r, c]."""
    marked = blocks.to(torch.int32)
    index = torch.argsort(marked, dim=1, descending=True, stable=True).to(torch.int32)
    return marked.sum(1, dtype=torch.int32)[None, None], index.contiguous()[None, None]
