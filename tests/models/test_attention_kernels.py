"""The flash providers' calling conventions, with plain stand-ins for their functions, and the rule that picks one."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from attention_cases import NAMED, exact, tensors
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.events import events
from ardist.models.attention import attention, available_backends, cuda_kernels, flash
from ardist.models.attention.cpu_kernel import CPUKernel
from ardist.models.attention.cuda_kernels import (
    FlashAttention2Kernel,
    FlashAttention3Kernel,
    TorchCUDAKernel,
    block_starts,
)
from ardist.models.attention.merging import block_causal
from ardist.models.attention.pieces import Blocks, Piece


def band(n: int, m: int, left: int, right: int) -> Tensor:
    """What the providers document: aligned at the end, -1 unbounded."""
    distance = torch.arange(m)[None, :] - torch.arange(n)[:, None] - (m - n)
    return ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))


def scores_of(q: Tensor, k: Tensor, scale: float, left: int, right: int) -> Tensor:
    assert q.shape[-1] % 8 == 0, "providers take multiples of 8"
    assert q.stride(-1) == k.stride(-1) == 1, "providers take a unit last stride"
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    mask = band(q.shape[1], k.shape[1], left, right)
    assert mask.any(1).all(), "a query without keys"
    return scores.masked_fill(~mask, -torch.inf)


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, starts: Tensor | None, longest: int
) -> tuple[Tensor, Tensor]:
    if starts is None:
        scores = scores_of(q, k, scale, left, right)
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v), scores.logsumexp(-1)
    assert starts.dtype == torch.int32
    outs, lses = [], []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert 0 < stop - start <= longest
        out, lse = plain_forward(*(x[None, start:stop] for x in (q, k, v)), scale, left, right, None, 0)
        outs.append(out[0])
        lses.append(lse[0])
    assert int(starts[-1]) == q.shape[0]
    return torch.cat(outs), torch.cat(lses, 1)


def plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int,
    right: int,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if starts is None:
        assert lse.is_contiguous()
        assert grad.stride(-1) == v.stride(-1) == out.stride(-1) == 1, "providers take a unit last stride"
        weights = (scores_of(q, k, scale, left, right) - lse[..., None]).exp()
        inner = torch.einsum("bnhd,bnhd->bhn", grad, out)
        ds = weights * (torch.einsum("bnhd,bmhd->bhnm", grad, v) - inner[..., None]) * scale
        return (
            torch.einsum("bhnm,bmhd->bnhd", ds, k),
            torch.einsum("bhnm,bnhd->bmhd", ds, q),
            torch.einsum("bhnm,bnhd->bmhd", weights, grad),
        )
    parts = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        rows = (x[None, start:stop] for x in (grad, q, k, v, out))
        parts.append(plain_backward(*rows, lse[None, :, start:stop].contiguous(), scale, left, right, None))
    dq, dk, dv = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    return dq, dk, dv


def flash_attn_module() -> types.ModuleType:
    """The functions of flash-attn 2.7 with their published parameters."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap, alibi_slopes, return_softmax) == (0.0, False, 0.0, None, False)
        out, lse = plain_forward(q, k, v, softmax_scale, window_size_left, window_size_right, None, 0)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k
        window = (window_size_left, window_size_right)
        out, lse = plain_forward(q, k, v, softmax_scale, *window, cu_seqlens_q, max_seqlen_q)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        parts = plain_backward(dout, q, k, v, out, softmax_lse, softmax_scale, *window, None)
        for target, part in zip((dq, dk, dv), parts, strict=True):
            target.copy_(part)
        return torch.empty(0)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        parts = plain_backward(dout, q, k, v, out, softmax_lse, softmax_scale, *window, cu_seqlens_q)
        for target, part in zip((dq, dk, dv), parts, strict=True):
            target.copy_(part)
        return torch.empty(0)

    for function in (
        _flash_attn_forward,
        _flash_attn_varlen_forward,
        _flash_attn_backward,
        _flash_attn_varlen_backward,
    ):
        setattr(module, function.__name__, function)
    return module


def flash_attn_3_module() -> types.ModuleType:
    """The two functions of FlashAttention-3 with the published parameters that matter here."""
    module = types.ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        out, lse = plain_forward(q, k, v, softmax_scale, *window, cu_seqlens_q, max_seqlen_q or 0)
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        parts = plain_backward(dout, q, k, v, out, softmax_lse, softmax_scale, *window, cu_seqlens_q)
        for target, part in zip((dq, dk, dv), parts, strict=True):
            target.copy_(part)
        return torch.empty(0)

    module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
    return module


def aten_forward(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout, causal, debug, *, scale, window_size_left,
                 window_size_right):  # fmt: skip
    assert (dropout, causal, debug) == (0.0, False, False)
    if starts_q is None:
        assert (longest_q, longest_k) == (q.shape[1], k.shape[1])
    out, lse = plain_forward(q, k, v, scale, window_size_left, window_size_right, starts_q, longest_q)
    return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)


def aten_backward(grad, q, k, v, out, lse, starts_q, starts_k, longest_q, longest_k, dropout, causal, seed, offset, *,
                  scale, window_size_left, window_size_right):  # fmt: skip
    return plain_backward(grad, q, k, v, out, lse, scale, window_size_left, window_size_right, starts_q)


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain functions in the place of the three providers."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash_attn_module())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash_attn_3_module())
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", aten_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", aten_backward)
    cuda_kernels._module.cache_clear()


@pytest.mark.usefixtures("providers")
@pytest.mark.parametrize("kernel", [TorchCUDAKernel(), FlashAttention2Kernel(), FlashAttention3Kernel()], ids=type)
@pytest.mark.parametrize("head_dim", [8, 5])
def test_providers_are_called_as_they_document(kernel: cuda_kernels._CUDAKernel, head_dim: int) -> None:
    for name, layout in NAMED.items():
        q, k, v, grad = tensors(layout, head_dim)
        out = block_causal(q, k, v, layout, kernel)
        found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        for x, y in zip(found, exact(q, k, v, grad, layout), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("providers")
def test_providers_get_unit_strides_whatever_the_caller_has() -> None:
    layout = NAMED["strict with context"]
    q, k, v, _ = tensors(layout)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    out = block_causal(*strided, layout, TorchCUDAKernel())
    found = torch.autograd.grad(out.sum(), strided)  # the gradient of a sum has stride 0 everywhere
    _, *expected = exact(q, k, v, torch.ones_like(out), layout)
    torch.testing.assert_close(found, tuple(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [None, Blocks(4, 3, 2), Blocks(0, 5, 2)])
def test_builtin_operator_accepts_the_call(blocks: Blocks | None) -> None:
    """The real operator's schema and shapes, on tensors without data."""
    q = torch.empty(2, 10, 3, 12, device="meta", dtype=torch.bfloat16)
    k = q if blocks else torch.empty(2, 14, 3, 12, device="meta", dtype=torch.bfloat16)
    piece = Piece((0, 10), (0, k.shape[1]), left=0 if blocks else None, right=None if blocks else 0, blocks=blocks)
    kernel = TorchCUDAKernel()
    out, lse = kernel.forward(q, k, k, 0.3, piece)
    assert out.shape == q.shape
    assert lse.shape == (2, 3, 10)
    assert lse.dtype == torch.float32
    dq, dk, dv = kernel.backward(out, q, k, k, out, lse, 0.3, piece)
    assert dq.shape == q.shape
    assert dk.shape == dv.shape == k.shape


def test_block_starts() -> None:
    assert block_starts(2, Blocks(3, 2, 2), torch.device("cpu")).tolist() == [0, 3, 5, 7, 10, 12, 14]
    assert block_starts(2, Blocks(0, 4, 2), torch.device("cpu")).tolist() == [0, 4, 8, 12, 16]


class _ForgetsTheMerge(CPUKernel):
    """Plausible and wrong: its gradients ignore the other pieces."""

    name = "forgets"

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, piece: Piece
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_out, own_lse = self.forward(q, k, v, scale, piece)
        return super().backward(grad, q, k, v, own_out, own_lse, scale, piece)


class _Changed(CPUKernel):
    """A provider whose interface is no longer what it was."""

    name = "changed"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece) -> tuple[Tensor, Tensor]:
        raise TypeError("forward() got an unexpected keyword argument 'window_size_left'\nand more lines")


def test_kernel_that_disagrees_with_the_reference_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flash, "KERNELS", {kernel.name: kernel for kernel in (_ForgetsTheMerge(), _Changed(), CPUKernel())}
    )
    flash.unavailable.cache_clear()
    events.clear()
    try:
        here = available_backends("cpu", torch.float64)
        assert "its results are off by" in str(here["flash/forgets"])
        assert here["flash/changed"] == "TypeError: forward() got an unexpected keyword argument 'window_size_left'"
        assert here["flash/cpu"] is None
        assert flash.select("cpu", torch.float64, 64) == "cpu"
        assert events.snapshot()["attention.kernel_rejected"] == 2, "each is tried and reported once"

        flash.KERNELS.pop("cpu")
        q, k, v, _ = tensors(NAMED["strict"])
        cuda_only = "no flash kernel works here.*forgets: its results.*changed: TypeError.*legal.*: auto, (refer|sdpa)"
        flash_name = "flash"
        with pytest.raises(InvalidValueError, match=cuda_only):
            attention(q, k, v, NAMED["strict"], flash_name)
    finally:
        flash.unavailable.cache_clear()
        events.clear()


def test_trying_a_kernel_leaves_no_trace_in_the_random_state() -> None:
    flash.unavailable.cache_clear()
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        assert flash.unavailable("cpu", "cpu", torch.bfloat16, 72) is None
    assert torch.equal(torch.random.get_rng_state(), before)
