"""FlexAttention: its block tables against the mask, and its compiled forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from attention_cases import NAMED, exact, layouts, tensors
from hypothesis import given, settings

from ardist.errors import InvalidValueError
from ardist.models.attention import AttentionLayout, attention, flex

CPU = torch.device("cpu")


@pytest.fixture
def compiled() -> Iterator[None]:
    """Compiled as in the product: without the test session's shape checks, and forgotten afterwards."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_block_tables_mark_exactly_the_partial_and_the_full_blocks(layout: AttentionLayout) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK_TOKENS", 4)
        tables = flex._tables.__wrapped__(layout, CPU)
    rows, columns = -(-layout.num_queries // 4), -(-layout.num_keys // 4)
    padded = torch.zeros(rows * 4, columns * 4, dtype=torch.bool)
    padded[: layout.num_queries, : layout.num_keys] = layout.dense_mask()
    blocks = padded.view(rows, 4, columns, 4).transpose(1, 2).flatten(2)
    expected = {"partial": blocks.any(2) & ~blocks.all(2), "full": blocks.all(2)}
    expected |= {"partial, back": expected["partial"].T, "full, back": expected["full"].T}
    for (name, dense), count, index in zip(expected.items(), tables[::2], tables[1::2], strict=True):
        assert count.dtype == index.dtype == torch.int32, name
        for row in range(dense.shape[0]):
            marked = index[0, 0, row, : count[0, 0, row]]
            assert marked.tolist() == dense[row].nonzero().flatten().tolist(), name


def test_block_mask_is_built_once_per_layout() -> None:
    layout = AttentionLayout.training(5, 60)
    assert flex.block_mask(layout, CPU) is flex.block_mask(AttentionLayout.training(5, 60), CPU)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_compiled_forward_agrees_and_no_bit_of_the_future_is_seen() -> None:
    layout = AttentionLayout.training(9, 40, 5)
    q, k, v, grad = tensors(layout, 16, torch.float32)
    with torch.no_grad():
        before = attention(q, k, v, layout, "flex")
        torch.testing.assert_close(before.double(), exact(q, k, v, grad, layout)[0], rtol=0, atol=2e-6)
        later = 5 + 6 * 40
        k[:, :, later:] *= 3.0
        v[:, :, later:] += 1.0
        after = attention(q, k, v, layout, "flex")
    assert torch.equal(after[:, :, :later], before[:, :, :later])
    assert not torch.equal(after[:, :, later:], before[:, :, later:])


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_cached_layout_agrees_and_too_many_layouts_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the compiler's limit there is an error, never a quiet dense computation."""
    monkeypatch.setattr(flex, "COMPILED_LAYOUTS", 1)
    flex._compiled.cache_clear()
    cached, other = NAMED["cached, window, evicted"], NAMED["cached"]
    q, k, v, grad = tensors(cached, 16, torch.float32)
    more = tensors(other, 16, torch.float32)
    try:
        with torch.no_grad():
            out = attention(q, k, v, cached, "flex")
            torch.testing.assert_close(out.double(), exact(q, k, v, grad, cached)[0], rtol=0, atol=2e-6)
            with pytest.raises(InvalidValueError, match="limit on that is reached; legal.*sdpa, flash"):
                attention(*more[:3], other, "flex")
    finally:
        flex._compiled.cache_clear()
