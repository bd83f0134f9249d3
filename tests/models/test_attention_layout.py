"""The mask's one rule against a literal loop written from the paper's words, and its closed forms against the mask."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from attention_cases import layouts, literal_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from ardist.errors import InvalidValueError
from ardist.models.attention import AttentionLayout
from ardist.models.attention.layout import _sum_of_clipped


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Past the type annotations, which these tests check at run time and the product does not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_mask_and_pair_count_against_the_literal_rule(layout: AttentionLayout) -> None:
    mask = layout.dense_mask()
    assert mask.tolist() == literal_mask(layout)
    assert layout.num_pairs() == int(mask.sum())
    assert mask.any(1).all(), "every query sees at least one key"


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_visible_frames_are_the_rows_of_the_mask(layout: AttentionLayout) -> None:
    length = layout.tokens_per_frame
    mask = layout.dense_mask()[layout.num_context_queries :, layout.context_tokens :]
    for row, frame in enumerate(range(*layout.query_frames)):
        start, stop = layout.visible_frames(frame)
        expected = torch.zeros(layout.num_keys - layout.context_tokens, dtype=torch.bool)
        expected[(start - layout.key_frames[0]) * length : (stop - layout.key_frames[0]) * length] = True
        assert torch.equal(mask[row * length], expected)


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_cached_rows_are_rows_of_the_training_mask(layout: AttentionLayout) -> None:
    """What cached inference applies is a slice of what training applies, whatever frames are queried and kept."""
    length, context = layout.tokens_per_frame, layout.context_tokens
    num_frames = layout.key_frames[1]
    full = AttentionLayout.training(num_frames, length, context, layout.kind, layout.window).dense_mask()
    rows = [
        *range(layout.num_context_queries),
        *range(context + layout.query_frames[0] * length, context + layout.query_frames[1] * length),
    ]
    columns = [*range(context), *range(context + layout.key_frames[0] * length, context + num_frames * length)]
    assert torch.equal(layout.dense_mask(), full[rows][:, columns])
    dropped = [column for column in range(full.shape[1]) if column not in columns]
    video_rows = rows[layout.num_context_queries :]
    if layout.kind != "bidirectional":
        assert layout.complete == (not full[video_rows][:, dropped].any())


def test_reference_shape_pair_count() -> None:
    """77 context tokens and 16 frames of 32: 589 tokens, and the count by hand."""
    layout = AttentionLayout.training(16, 32, 77)
    assert layout.num_queries == layout.num_keys == 589
    assert layout.num_pairs() == 77 * 77 + 512 * 77 + 32 * 32 * (16 * 17 // 2)
    assert AttentionLayout.training(16, 32, 77, "bidirectional").num_pairs() == 77 * 77 + 512 * (77 + 512)
    assert AttentionLayout.training(16, 32, 77, "released").num_pairs() == layout.num_pairs() + 77 * 512


def test_context_alone_may_ask() -> None:
    layout = AttentionLayout(4, (0, 0), (0, 0), context_tokens=3)
    assert layout.dense_mask().tolist() == [[True] * 3] * 3
    assert layout.num_pairs() == 9
    assert layout.complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_frame": 0}, r"tokens_per_frame=0 is illegal; legal: at least 1"),
        ({"context_tokens": -1}, r"context_tokens=-1 is illegal"),
        ({"kind": "strikt"}, r"kind='strikt' is not known \(did you mean 'strict'\?\); legal: strict, released, bidir"),
        ({"window": 0}, r"window=0 is illegal; legal: at least 1"),
        ({"kind": "bidirectional", "window": 2}, r"window=2 is illegal with kind='bidirectional'"),
        ({"query_frames": (2, 1)}, r"query_frames=\(2, 1\) is illegal"),
        ({"key_frames": (-1, 4)}, r"key_frames=\(-1, 4\) is illegal"),
        ({"query_frames": (0, 5)}, r"query_frames=\(0, 5\) are not all among key_frames=\(0, 4\)"),
        ({"query_frames": (1, 1)}, r"no query"),
    ],
)
def test_illegal_layouts_name_the_value_and_the_legal_ones(changes: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"tokens_per_frame": 2, "query_frames": (0, 4), "key_frames": (0, 4), **changes}
    with pytest.raises(InvalidValueError, match=message):
        AttentionLayout(**values)  # type: ignore[arg-type]


@given(st.integers(-9, 9), st.integers(0, 12), st.integers(-5, 5), st.integers(0, 9))
def test_sum_of_clipped(first: int, count: int, low: int, span: int) -> None:
    expected = sum(min(max(i, low), low + span) for i in range(first, first + count))
    assert _sum_of_clipped(first, first + count, low, low + span) == expected


def test_layouts_are_hashable_values() -> None:
    assert len({AttentionLayout.training(4, 2), AttentionLayout.training(4, 2), AttentionLayout.training(5, 2)}) == 2


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_relative_layout_is_the_same_mask_and_keys_are_values(layout: AttentionLayout) -> None:
    relative = layout.relative()
    assert relative.key_frames[0] == 0
    assert torch.equal(relative.dense_mask(), layout.dense_mask())
    assert relative.num_pairs() == layout.num_pairs()
    assert AttentionLayout.from_key(layout.key()) == layout


@pytest.mark.parametrize("window", [2.5, 2.0, True])
@pytest.mark.usefixtures("unchecked")
def test_a_window_that_is_no_integer_is_refused(window: float) -> None:
    with pytest.raises(InvalidValueError, match=f"window={window} is illegal; legal: an integer"):
        AttentionLayout.training(4, 2, window=window)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 2.5), r"tokens_per_frame=2\.5"),
        ((2.5, 4), r"the end of query_frames=2\.5"),
        ((4, 2, 1.0), r"context_tokens=1\.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_counts_that_are_no_integers_are_refused(sizes: tuple[float, ...], message: str) -> None:
    """The mask of half a token has a shape and pairs, and would only fail far from here."""
    with pytest.raises(InvalidValueError, match=f"{message} is illegal; legal: an integer"):
        AttentionLayout.training(*sizes)  # type: ignore[arg-type]
