"""The decomposition for flash kernels is the mask, pair by pair, each pair once."""

from __future__ import annotations

import pytest
import torch
from attention_cases import layouts
from hypothesis import given, settings

from ardist.models.attention import AttentionLayout
from ardist.models.attention.pieces import pieces


@given(layouts())
@settings(max_examples=400, deadline=None)
def test_pieces_cover_the_mask_once_and_nothing_else(layout: AttentionLayout) -> None:
    count = torch.zeros(layout.num_queries, layout.num_keys, dtype=torch.long)
    for piece in pieces(layout):
        mask = piece.mask()
        assert mask.any(1).all(), "a kernel must never see a query without keys"
        count[slice(*piece.queries), slice(*piece.keys)] += mask
    assert torch.equal(count, layout.dense_mask().long())


@pytest.mark.parametrize(
    ("layout", "calls"),
    [
        (AttentionLayout.training(16, 32, 77), 2),
        (AttentionLayout.training(4096, 32), 2),
        (AttentionLayout.training(16, 32, 77, "released"), 3),
        (AttentionLayout.training(64, 32, 77, window=16), 5),
        (AttentionLayout.training(16, 32, 77, "bidirectional"), 2),
        (AttentionLayout.training(1, 32), 1),
        (AttentionLayout(32, (9, 10), (0, 10), 77, context_queries=False), 1),
        (AttentionLayout(32, (9, 12), (0, 12), 77, context_queries=False), 2),
        (AttentionLayout(32, (40, 41), (25, 41), context_queries=False, window=16), 1),
    ],
)
def test_number_of_kernel_calls_does_not_grow_with_the_frames(layout: AttentionLayout, calls: int) -> None:
    assert len(pieces(layout)) == calls
