"""Attention backends on CUDA against the fp64 reference, in every dtype they take, and causality to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

from ardist.models.attention import AttentionLayout, attention, available_backends, flash, resolve_backend
from ardist.models.attention.merging import block_causal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUTS = {
    "reference shape": AttentionLayout.training(16, 32, 77),
    "no context": AttentionLayout.training(5, 100),
    "released": AttentionLayout.training(6, 33, 7, "released"),
    "bidirectional": AttentionLayout.training(4, 40, 5, "bidirectional"),
    "window": AttentionLayout.training(20, 32, 77, window=4),
    "window of one frame": AttentionLayout.training(5, 40, 3, window=1),
    "one token per frame": AttentionLayout.training(70, 1, 4, window=9),
    "one frame": AttentionLayout.training(1, 64, 5),
    "cached": AttentionLayout(32, (12, 16), (0, 16), 77, context_queries=False),
    "cached, one frame, evicted": AttentionLayout(32, (30, 31), (15, 31), 77, context_queries=False, window=16),
    "large frames": AttentionLayout.training(4, 512, 77),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
HALF = (torch.bfloat16, torch.float16)
KERNELS = ("flash-attn-3", "flash-attn", "torch")


@pytest.fixture(autouse=True)
def _as_in_the_product() -> Iterator[None]:
    """Without the test session's shape checks, which compilers cannot trace, and with full fp32 products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.set_float32_matmul_precision(precision)


def tensors(layout: AttentionLayout, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (layout.num_queries, layout.num_keys, layout.num_keys, layout.num_queries)
    drawn = (torch.randn(2, n, 3, head_dim, generator=generator) for n in lengths)
    q, k, v, grad = (x.to("cuda", dtype).transpose(1, 2) for x in drawn)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def errors(out: Tensor, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: AttentionLayout) -> list[float]:
    """Of the output and the three gradients, relative to the largest value of each in fp64."""
    found = (out, *torch.autograd.grad(out, (q, k, v), grad))
    a, b, c = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = attention(a, b, c, layout, "reference")
    expected = (exact, *torch.autograd.grad(exact, (a, b, c), grad.double()))
    return [float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_sdpa(name: str, dtype: torch.dtype) -> None:
    q, k, v, grad = tensors(LAYOUTS[name], 72, dtype)
    out = attention(q, k, v, LAYOUTS[name], "sdpa")
    assert max(errors(out, q, k, v, grad, LAYOUTS[name])) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", ["reference shape", "window", "released", "cached"])
def test_flex(name: str, dtype: torch.dtype) -> None:
    reason = available_backends("cuda", dtype, 64)["flex"]
    if reason:
        pytest.skip(reason)
    torch._dynamo.reset()
    q, k, v, grad = tensors(LAYOUTS[name], 64, dtype)
    out = attention(q, k, v, LAYOUTS[name], "flex")
    assert max(errors(out, q, k, v, grad, LAYOUTS[name])) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [64, 72, 100, 128])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_flash_kernels(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    reason = flash.unavailable(kernel, "cuda", dtype, head_dim)
    if reason:
        pytest.skip(reason)
    for name, layout in LAYOUTS.items():
        q, k, v, grad = tensors(layout, head_dim, dtype)
        out = block_causal(q, k, v, layout, flash.KERNELS[kernel])
        assert out.dtype == dtype
        assert max(errors(out, q, k, v, grad, layout)) < TOLERANCE[dtype], name


def test_builtin_kernel_works_where_the_hardware_allows() -> None:
    """The built-in kernel must not be rejected for a reason of our own making."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the built-in flash kernel needs compute capability 8.0")
    for dtype in HALF:
        assert flash.unavailable("torch", "cuda", dtype, 72) is None


def test_auto() -> None:
    q = torch.zeros(1, 1, 589, 72, device="cuda")
    layout = LAYOUTS["reference shape"]
    assert resolve_backend("auto", layout, q) == "sdpa"
    flash_works = available_backends("cuda", torch.bfloat16, 72)["flash"] is None
    assert resolve_backend("auto", layout, q.bfloat16()) == ("flash" if flash_works else "sdpa")
    assert "float16 and bfloat16" in str(available_backends("cuda", torch.float32)["flash"])


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex", "flash"])
@pytest.mark.parametrize(
    "layout",
    [
        AttentionLayout.training(6, 32, 77),
        AttentionLayout.training(6, 32, 77, window=3),
        AttentionLayout(32, (12, 18), (0, 18), 77, context_queries=False),
        AttentionLayout(32, (12, 18), (9, 18), 77, context_queries=False, window=4),
    ],
    ids=["training", "training, window", "cached", "cached, window, evicted"],
)
def test_causality_to_the_last_bit(backend: str, layout: AttentionLayout) -> None:
    """Nothing of the last three frames reaches the three before them."""
    reason = available_backends("cuda", torch.bfloat16, 72, requires_grad=True)[backend]
    if reason:
        pytest.skip(reason)
    torch._dynamo.reset()
    q, k, v, _ = tensors(layout, 72, torch.bfloat16)
    later = 3 * layout.tokens_per_frame
    out = attention(q, k, v, layout, backend)
    grads = torch.autograd.grad(out[:, :, :-later].float().square().sum(), (q, k, v))
    for grad in grads:
        assert torch.count_nonzero(grad[:, :, -later:]) == 0
        assert torch.count_nonzero(grad[:, :, :-later]) > 0
    with torch.no_grad():
        before = attention(q, k, v, layout, backend)
        for x in (q, k, v):
            x[:, :, -later:] *= 3.0
        after = attention(q, k, v, layout, backend)
    assert torch.equal(after[:, :, :-later], before[:, :, :-later])
    assert not torch.equal(after[:, :, -later:], before[:, :, -later:])


@pytest.mark.slow
def test_flash_compiles_into_one_graph() -> None:
    if available_backends("cuda", torch.bfloat16, 72)["flash"]:
        pytest.skip("no flash kernel works here")
    torch._dynamo.reset()
    layout = LAYOUTS["reference shape"]
    q, k, v, grad = tensors(layout, 72, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, layout, "flash"), fullgraph=True)
    assert max(errors(compiled(q, k, v), q, k, v, grad, layout)) < TOLERANCE[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_at_eight_thousand_tokens(head_dim: int) -> None:
    if available_backends("cuda", torch.bfloat16, head_dim)["flash"]:
        pytest.skip("no flash kernel works here")
    layout = AttentionLayout.training(16, 512, 77)
    q, k, v, grad = (x[:1, :1] for x in tensors(layout, head_dim, torch.bfloat16))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    assert max(errors(attention(q, k, v, layout, "flash"), q, k, v, grad, layout)) < TOLERANCE[torch.bfloat16]
