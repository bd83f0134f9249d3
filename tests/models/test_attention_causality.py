"""Nothing of a later frame reaches an earlier one: not in a value, not in a gradient, not in the last bit."""

from __future__ import annotations

import pytest
import torch
from attention_cases import tensors
from torch import Tensor

from ardist.models.attention import AttentionLayout, attention

BACKENDS = ("reference", "sdpa", "flash")
FRAMES, LENGTH, CONTEXT = 6, 7, 3
WINDOWS = (None, 3)


def rows(frame: int) -> slice:
    return slice(CONTEXT + frame * LENGTH, CONTEXT + (frame + 1) * LENGTH)


def two_layers(x: Tensor, layout: AttentionLayout, backend: str) -> Tensor:
    """Each layer feeds the next: a leak through the context shows from the second one on."""
    for turn in (1.0, 0.7):
        x = x + attention(x * turn, x.flip(-1), x.sin(), layout, backend)
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strict_gradient_of_later_frames_is_exactly_zero(backend: str, window: int | None, dtype: torch.dtype) -> None:
    layout = AttentionLayout.training(FRAMES, LENGTH, CONTEXT, window=window)
    x = tensors(layout, dtype=dtype)[0]
    for frame in range(FRAMES):
        (grad,) = torch.autograd.grad(two_layers(x, layout, backend)[:, :, rows(frame)].float().square().sum(), x)
        assert grad[:, :, rows(frame)].abs().max() > 0
        for later in range(frame + 1, FRAMES):
            assert torch.count_nonzero(grad[:, :, rows(later)]) == 0
        if window is not None:
            # Two layers reach back two windows less the frames they share.
            for forgotten in range(0, frame - 2 * (window - 1)):
                assert torch.count_nonzero(grad[:, :, rows(forgotten)]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_strict_values_of_earlier_frames_do_not_move_by_a_bit(backend: str, window: int | None) -> None:
    layout = AttentionLayout.training(FRAMES, LENGTH, CONTEXT, window=window)
    x = tensors(layout, dtype=torch.float32)[0].detach()
    before = two_layers(x, layout, backend)
    for frame in range(FRAMES):
        changed = x.clone()
        changed[:, :, rows(frame)] *= 3.0
        after = two_layers(changed, layout, backend)
        assert torch.equal(after[:, :, : rows(frame).start], before[:, :, : rows(frame).start])
        assert not torch.equal(after[:, :, rows(frame)], before[:, :, rows(frame)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_released_leaks_through_the_context(backend: str) -> None:
    """The counter-example that shows the tests above can fail."""
    layout = AttentionLayout.training(FRAMES, LENGTH, CONTEXT, "released")
    x = tensors(layout, dtype=torch.float32)[0]
    out = two_layers(x, layout, backend)
    (grad,) = torch.autograd.grad(out[:, :, rows(0)].square().sum(), x)
    assert grad[:, :, rows(FRAMES - 1)].abs().max() > 1e-6
    one = attention(x, x, x, layout, backend)
    (grad,) = torch.autograd.grad(one[:, :, rows(0)].square().sum(), x)
    assert torch.count_nonzero(grad[:, :, rows(FRAMES - 1)]) == 0, "one layer alone does not leak"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_cached_inference_reproduces_the_training_rows(backend: str, window: int | None) -> None:
    """Any run of frames asked alone, over what a cache keeps, gives what the whole sequence gives."""
    full = AttentionLayout.training(FRAMES, LENGTH, CONTEXT, window=window)
    q, k, v, _ = tensors(full)
    whole = attention(q, k, v, full, backend)
    for start in range(FRAMES):
        for stop in range(start + 1, FRAMES + 1):
            oldest = 0 if window is None else max(0, start - window + 1)
            layout = AttentionLayout(LENGTH, (start, stop), (oldest, stop), CONTEXT, False, "strict", window)
            assert layout.complete
            queries = slice(rows(start).start, rows(stop - 1).stop)
            keys, values = (
                torch.cat([x[:, :, :CONTEXT], x[:, :, rows(oldest).start : rows(stop - 1).stop]], 2) for x in (k, v)
            )
            out = attention(q[:, :, queries], keys, values, layout, backend)
            torch.testing.assert_close(out, whole[:, :, queries], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_inference_ignores_what_the_future_holds(backend: str) -> None:
    """Keys of later frames may be present; the result has not one bit of them."""
    layout = AttentionLayout(LENGTH, (2, 4), (0, FRAMES), CONTEXT, context_queries=False)
    q, k, v, _ = tensors(layout, dtype=torch.float32)
    out = attention(q, k, v, layout, backend)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[:, :, rows(4).start :], v2[:, :, rows(4).start :] = 9.0, -9.0
    assert torch.equal(attention(q, k2, v2, layout, backend), out)
    grad_k, grad_v = torch.autograd.grad(out.square().sum(), (k, v))
    assert torch.count_nonzero(grad_k[:, :, rows(4).start :]) == torch.count_nonzero(grad_v[:, :, rows(4).start :]) == 0
