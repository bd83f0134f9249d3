"""Every backend against a literal fp64 computation: output and all three gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jaxtyping
import pytest
import torch
from attention_cases import NAMED, exact, layouts, tensors
from hypothesis import given, settings
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.models.attention import (
    BACKENDS,
    AttentionLayout,
    attention,
    available_backends,
    flex,
    resolve_backend,
    sdpa,
    sdpa_cpu,
)
from ardist.models.attention.cuda_kernels import _cached_starts
from ardist.models.attention.dispatch import _check
from ardist.models.attention.pieces import Blocks

CPU = torch.device("cpu")

DIFFERENTIABLE = ("reference", "sdpa", "flash")


def results(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: AttentionLayout, backend: str) -> list[Tensor]:
    out = attention(q, k, v, layout, backend)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error, relative to the largest value of each tensor (1 where all values are smaller)."""
    pairs = zip(found, expected, strict=True)
    return max(float((x.double() - y).abs().max() / y.abs().max().clamp(min=1)) for x, y in pairs)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("name", NAMED)
def test_agreement_in_fp64(name: str, backend: str) -> None:
    values = tensors(NAMED[name])
    assert worst(results(*values, NAMED[name], backend), exact(*values, NAMED[name])) < 1e-12


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@given(layout=layouts())
@settings(max_examples=60, deadline=None)
def test_agreement_on_drawn_layouts(backend: str, layout: AttentionLayout) -> None:
    values = tensors(layout, head_dim=3)
    assert worst(results(*values, layout, backend), exact(*values, layout)) < 1e-12


@given(layout=layouts())
@settings(max_examples=60, deadline=None)
def test_chunks_of_every_size_agree(layout: AttentionLayout) -> None:
    """Tiny limits force what only long sequences would reach: many chunks, ragged ends, windows off the context."""
    values = tensors(layout, head_dim=3)
    expected = exact(*values, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "ONE_CALL_TOKENS", 0)
        for chunk in (1, 2, 5, 9):
            sdpa._cached_plan.cache_clear()
            patch.setattr(sdpa, "CHUNK_TOKENS_TRAINING", chunk)
            assert worst(results(*values, layout, "sdpa"), expected) < 1e-12
    sdpa._cached_plan.cache_clear()


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("head_dim", [1, 5, 64, 72])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_agreement_in_working_precision(dtype: torch.dtype, tolerance: float, head_dim: int, backend: str) -> None:
    for name in ("strict with context", "window", "several chunks of several frames"):
        values = tensors(NAMED[name], head_dim, dtype)
        assert worst(results(*values, NAMED[name], backend), exact(*values, NAMED[name])) < tolerance


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_agreement_when_the_scores_are_extreme(backend: str) -> None:
    """Pieces whose log-sum-exps lie hundreds apart still merge exactly."""
    for name in ("strict with context", "window"):
        values = tensors(NAMED[name], scale=12.0)
        assert worst(results(*values, NAMED[name], backend), exact(*values, NAMED[name])) < 1e-11


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_strides_do_not_matter(backend: str) -> None:
    """Tensors as a fused projection leaves them, and a gradient broadcast from a sum."""
    layout = NAMED["strict with context"]
    packed = torch.randn(2, layout.num_keys, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    out = attention(q, k, v, layout, backend)
    (found,) = torch.autograd.grad(out.sum(), packed)
    _, *grads = exact(q, k, v, torch.ones_like(out), layout)
    expected = torch.stack([grad.transpose(1, 2) for grad in grads], 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_inference_mode_first_does_not_spoil_training(backend: str) -> None:
    layout = AttentionLayout.training(11, 9, 1)
    values = tensors(layout)
    with torch.inference_mode():
        attention(*values[:3], layout, backend)
    assert worst(results(*values, layout, backend), exact(*values, layout)) < 1e-12


def test_what_is_cached_is_fit_for_training() -> None:
    """Tensors kept for the next call are ordinary ones even when the first call came in inference mode."""
    layout = AttentionLayout.training(5, 13)
    with torch.inference_mode():
        kept = [sdpa._cached_mask(layout, CPU), *flex._tables(layout, CPU), _cached_starts(2, Blocks(3, 4, 5), CPU)]
    assert not any(tensor.is_inference() for tensor in kept)


def test_sdpa_scores_no_forbidden_pair_of_large_frames_and_copies_no_keys() -> None:
    """One call per frame, contiguous keys, no mask; with small frames the masks stay as tall as a chunk."""
    layout = AttentionLayout.training(16, 64, 77)
    calls = sdpa.plan(sdpa.CHUNK_TOKENS_TRAINING, layout)
    pairs = sum((c.queries[1] - c.queries[0]) * (c.context + c.keys[1] - c.keys[0]) for c in calls)
    assert pairs == layout.num_pairs()
    assert all(c.mask is None and c.context == 0 for c in calls)
    small_frames = ((AttentionLayout.training(300, 4), 1.1), (AttentionLayout.training(300, 4, window=30), 1.6))
    for small, most in small_frames:
        calls = sdpa.plan(sdpa.CHUNK_TOKENS_TRAINING, small)
        pairs = sum((c.queries[1] - c.queries[0]) * (c.keys[1] - c.keys[0]) for c in calls)
        assert pairs < most * small.num_pairs()
        assert len({c.mask for c in calls}) <= 12, "masks are shared"
        assert max(c.mask.num_queries for c in calls if c.mask) <= sdpa.CHUNK_TOKENS_TRAINING


@pytest.mark.parametrize("attend", [sdpa.attend, functools.partial(attention, backend="sdpa")], ids=["any", "cpu"])
@pytest.mark.parametrize(
    "layout",
    [
        AttentionLayout.training(300, 4),
        AttentionLayout.training(300, 4, 5, window=30),
        AttentionLayout.training(64, 32, 77),
        AttentionLayout.training(150, 8, 77, "released"),
        AttentionLayout.training(150, 8, 77, "bidirectional"),
        AttentionLayout(8, (100, 150), (0, 150), 5, context_queries=False),
    ],
)
def test_masks_of_a_long_sequence_are_strips(
    attend: Callable[..., Tensor], layout: AttentionLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, on a CPU and elsewhere: no mask has more rows than a chunk, none is tokens x tokens."""
    for cached in (sdpa._cached_mask, sdpa_cpu._added, sdpa_cpu._cached_calls):
        cached.cache_clear()
    rows, dense_mask = [0], AttentionLayout.dense_mask

    def recorded(mask_of: AttentionLayout, device: torch.device | str = "cpu") -> Tensor:
        mask = dense_mask(mask_of, device)
        rows.append(len(mask))
        return mask

    monkeypatch.setattr(AttentionLayout, "dense_mask", recorded)
    q, k, v, grad = tensors(layout, head_dim=2, dtype=torch.float32)
    torch.autograd.grad(attend(q, k, v, layout), (q, k, v), grad)
    assert max(rows) <= sdpa.CHUNK_TOKENS_TRAINING
    assert (len(rows) > 1) == (layout.kind != "bidirectional"), "these frames are smaller than a chunk"


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_autocast_decides_the_dtype(backend: str) -> None:
    layout = NAMED["strict with context"]
    q, k, v, _ = tensors(layout, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k.bfloat16(), v, layout, backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(q, k, v, q, layout)[0], rtol=0, atol=3e-2)


def test_auto_on_cpu_is_sdpa() -> None:
    layout = NAMED["strict"]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        q = tensors(layout, dtype=dtype)[0]
        assert resolve_backend("auto", layout, q) == "sdpa"
        for name in DIFFERENTIABLE:
            assert resolve_backend(name, layout, q) == name


def test_available_backends_name_a_reason_or_none() -> None:
    here = available_backends("cpu", requires_grad=True)
    assert set(here) >= set(BACKENDS) - {"auto"}
    assert [name for name, reason in here.items() if reason is None] == ["reference", "sdpa", "flash", "flash/cpu"]
    assert here["flex"] == "FlexAttention has no gradients on cpu"
    assert here["flash/torch"] == "it runs on cuda, not on cpu"
    assert "float64" in str(available_backends("cpu", torch.float64)["flex"])


def test_bad_input_names_the_value_and_the_legal_ones() -> None:
    layout = NAMED["strict"]
    q, k, v, _ = tensors(layout)
    with pytest.raises(InvalidValueError, match=r"'flush' is not known \(did you mean 'flash'\?\); legal: auto, refer"):
        attention(q, k, v, layout, "flush")
    with pytest.raises(InvalidValueError, match="no gradients on cpu; legal: auto, reference, sdpa, flash"):
        attention(q.float(), k.float(), v.float(), layout, "flex")
    with pytest.raises(InvalidValueError, match=r"flex.*not float64; legal: auto, reference, sdpa, flash"):
        attention(q.detach(), k.detach(), v.detach(), layout, "flex")
    with pytest.raises(InvalidValueError, match=r"legal for this layout: 35 tokens in q, 35 in k and v"):
        attention(q[:, :, 1:], k, v, layout)
    with pytest.raises(InvalidValueError, match=r"legal for this layout: 35 tokens in q, 35 in k and v"):
        attention(q, k[:, :, 1:], v[:, :, 1:], layout)
    with pytest.raises(InvalidValueError, match="one floating-point dtype for all three"):
        attention(q, k.float(), v, layout)
    with pytest.raises(InvalidValueError, match=r"legal: four axes each, \[batch, heads, tokens, head dimension\]"):
        _check(q[0], k[0], v[0], layout)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize("backend", ["auto", "flash"])
def test_numbers_that_no_kernel_attends_with_are_refused(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the type annotations, which these tests check at run time and the product does not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    layout = NAMED["strict"]
    q, k, v = (x.detach().to(dtype) for x in tensors(layout)[:3])
    with pytest.raises(InvalidValueError, match=f"{dtype}; legal: one floating-point dtype for all three"):
        attention(q, k, v, layout, backend)


def test_flex_on_cuda_needs_heads_of_sixteen_channels() -> None:
    assert "head dimensions from 16, not 8" in str(available_backends("cuda", torch.bfloat16, 8)["flex"])
    assert "head dimensions" not in str(available_backends("cuda", torch.bfloat16, 16)["flex"])
