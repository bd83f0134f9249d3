"""Layouts to test attention with, and the mask as a literal loop."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ardist.models.attention import AttentionLayout


@st.composite
def layouts(draw: st.DrawFn) -> AttentionLayout:
    kind = draw(st.sampled_from(["strict", "released", "bidirectional"]))
    key_start = draw(st.integers(0, 4))
    key_stop = key_start + draw(st.integers(1, 6))
    query_start = draw(st.integers(key_start, key_stop - 1))
    query_stop = draw(st.integers(query_start + 1, key_stop))
    return AttentionLayout(
        tokens_per_frame=draw(st.integers(1, 4)),
        query_frames=(query_start, query_stop),
        key_frames=(key_start, key_stop),
        context_tokens=draw(st.integers(0, 3)),
        context_queries=draw(st.booleans()),
        kind=kind,
        window=None if kind == "bidirectional" else draw(st.none() | st.integers(1, 6)),
    )


def literal_mask(layout: AttentionLayout) -> list[list[bool]]:
    """Token by token: None marks a context token, a number the absolute frame of a video token."""
    length, context = layout.tokens_per_frame, [None] * layout.context_tokens
    queries = [
        *(context if layout.context_queries else []),
        *(f for f in range(*layout.query_frames) for _ in range(length)),
    ]
    keys = [*context, *(f for f in range(*layout.key_frames) for _ in range(length))]

    def sees(query: int | None, key: int | None) -> bool:
        if key is None:
            return True
        if query is None:
            return layout.kind == "released"
        if layout.kind == "bidirectional":
            return True
        reach = layout.window if layout.window is not None else 10**9
        return max(0, query - reach + 1) <= key <= query

    return [[sees(query, key) for key in keys] for query in queries]


NAMED = {
    "strict": AttentionLayout.training(5, 7),
    "strict with context": AttentionLayout.training(6, 5, 4),
    "released": AttentionLayout.training(5, 6, 3, "released"),
    "bidirectional": AttentionLayout.training(4, 6, 3, "bidirectional"),
    "window": AttentionLayout.training(9, 4, 3, window=3),
    "window without context": AttentionLayout.training(9, 4, window=4),
    "window of one frame": AttentionLayout.training(5, 4, 3, window=1),
    "one frame": AttentionLayout.training(1, 9, 4),
    "one token per frame": AttentionLayout.training(12, 1, 4),
    "one token per frame, window": AttentionLayout.training(12, 1, 2, window=5),
    "one token, one frame": AttentionLayout.training(1, 1),
    "context alone": AttentionLayout(4, (0, 0), (0, 0), context_tokens=6),
    "cached": AttentionLayout(4, (5, 8), (0, 8), 3, context_queries=False),
    "cached, one frame": AttentionLayout(6, (7, 8), (0, 8), 3, context_queries=False),
    "cached, window, evicted": AttentionLayout(4, (6, 9), (3, 9), 3, context_queries=False, window=4),
    "cached, later frames present": AttentionLayout(4, (2, 4), (1, 7), 2, context_queries=False),
    "many frames of few tokens": AttentionLayout.training(40, 3, 2),
    "many frames, window": AttentionLayout.training(30, 8, 5, window=6),
    "frames larger than a chunk": AttentionLayout.training(3, 70, 11),
    "several chunks of several frames": AttentionLayout.training(7, 24, 5),
    "several chunks, released": AttentionLayout.training(7, 24, 5, "released"),
    "several chunks, cached": AttentionLayout(24, (2, 8), (1, 8), 5, context_queries=False),
}


def tensors(
    layout: AttentionLayout, head_dim: int = 8, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v that require gradients, and a gradient of the output; values the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (layout.num_queries, layout.num_keys, layout.num_keys, layout.num_queries)
    q, k, v, grad = (torch.randn(2, 3, n, head_dim, generator=generator, dtype=torch.float64) for n in lengths)
    q, k, v = ((x * s).to(dtype).requires_grad_() for x, s in ((q, scale), (k, scale), (v, 1.0)))
    return q, k, v, grad.to(dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: AttentionLayout) -> list[Tensor]:
    """Output and gradients of masked softmax attention in fp64, from the literal mask and nothing of the product."""
    with torch.enable_grad():
        q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
        mask = torch.tensor(literal_mask(layout)).to(q.device)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
        weights = torch.where(mask, scores, -torch.inf).softmax(-1)
        out = torch.einsum("bhnm,bhmd->bhnd", weights, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]
