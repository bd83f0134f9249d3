"""FlashAttention on CUDA from three providers: FlashAttention-3, the flash-attn package, and PyTorch's built-in kernel.

All three take tokens before heads, a window ``(left, right)`` aligned at the last query and the last key with -1 for
unbounded, head dimensions that are multiples of 8, and packed sequences given by their starts; all return the
log-sum-exp as [b, h, n], or packed as [h, total]. A window of ``(-1, 0)`` is what they call causal.
"""

from __future__ import annotations

import abc
import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ardist.models.attention.kernels import FlashKernel
from ardist.models.attention.pieces import Blocks, Piece

_Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Call:
    """How a provider is called for one piece; `starts` is None for ordinary batches, else tensors are [total, h, d]."""

    scale: float
    left: int
    right: int
    starts: Tensor | None = None
    longest: int = 0


class _CUDAKernel(FlashKernel):
    """What the providers share: padding of the head dimension, and blocks as packed sequences."""

    def missing(self, device_type: str, dtype: torch.dtype) -> str | None:
        """It runs on CUDA in half precision, and the provider must be installed."""
        if device_type != "cuda":
            return f"it runs on cuda, not on {device_type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if not torch.cuda.is_available():
            return "no CUDA device is available"
        return self._provider_missing()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, piece: Piece) -> tuple[Tensor, Tensor]:
        """See `FlashKernel`."""
        batch, tokens, _, dim = q.shape
        call = _call(scale, piece, batch, q.device)
        out, lse = self._forward(_prepared(q, call), _prepared(k, call), _prepared(v, call), call)
        if call.starts is not None:
            out, lse = out.unflatten(0, (batch, tokens)), lse.unflatten(1, (batch, tokens)).transpose(0, 1)
        return out[..., :dim], lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, piece: Piece
    ) -> _Triple:
        """See `FlashKernel`."""
        batch, tokens, _, dim = q.shape
        call = _call(scale, piece, batch, q.device)
        if call.starts is not None:
            lse = lse.transpose(0, 1).flatten(1, 2)
        grad, q, k, v, out = (_prepared(x, call) for x in (grad, q, k, v, out))
        parts = self._backward(grad, q, k, v, out, lse.contiguous(), call)
        if call.starts is not None:
            # Blocks are square: there are as many keys as queries.
            dq, dk, dv = (x.unflatten(0, (batch, tokens))[..., :dim] for x in parts)
        else:
            dq, dk, dv = (x[..., :dim] for x in parts)
        return dq, dk, dv

    @abc.abstractmethod
    def _provider_missing(self) -> str | None:
        """Why the provider itself cannot be used, or None."""

    @abc.abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp in the provider's own layout."""

    @abc.abstractmethod
    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
    ) -> _Triple:
        """Gradients of q, k, v in the provider's own layout."""


class TorchCUDAKernel(_CUDAKernel):
    """The flash kernel inside PyTorch, present in every CUDA build for compute capability 8.0 and newer."""

    name = "torch"

    def _provider_missing(self) -> str | None:
        capability = torch.cuda.get_device_capability()
        return None if capability >= (8, 0) else f"it needs compute capability 8.0, this device has {capability}"

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        sizes = (call.starts, call.starts, *self._longest(q, k, call))
        window = {"window_size_left": call.left, "window_size_right": call.right}
        run = torch.ops.aten._flash_attention_forward
        out, lse, *_ = run(q, k, v, *sizes, 0.0, False, False, scale=call.scale, **window)
        return out, lse

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
    ) -> _Triple:
        sizes = (call.starts, call.starts, *self._longest(q, k, call))
        window = {"window_size_left": call.left, "window_size_right": call.right}
        # The state of the dropout generator: there is no dropout, so the kernel does not read it.
        state = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
        run = torch.ops.aten._flash_attention_backward
        dq, dk, dv = run(grad, q, k, v, out, lse, *sizes, 0.0, False, *state, scale=call.scale, **window)
        return dq, dk, dv

    @staticmethod
    def _longest(q: Tensor, k: Tensor, call: _Call) -> tuple[int, int]:
        return (q.shape[1], k.shape[1]) if call.starts is None else (call.longest, call.longest)


class FlashAttention2Kernel(_CUDAKernel):
    """The flash-attn package, version 2.7 or newer (extra ``[cuda]``)."""

    name = "flash-attn"
    module = "flash_attn.flash_attn_interface"

    def _provider_missing(self) -> str | None:
        return _import_problem(self.module)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        provider, options = _module(self.module), self._options(call) | {"return_softmax": False}
        run = provider._flash_attn_forward if call.starts is None else provider._flash_attn_varlen_forward
        out, lse, *_ = run(q, k, v, **options)
        return out, lse

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
    ) -> _Triple:
        provider, options = _module(self.module), self._options(call) | {"deterministic": _deterministic()}
        run = provider._flash_attn_backward if call.starts is None else provider._flash_attn_varlen_backward
        dq, dk, dv = _like(q), _like(k), _like(v)
        run(grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **options)
        return dq, dk, dv

    @staticmethod
    def _options(call: _Call) -> dict[str, Any]:
        plain = {"dropout_p": 0.0, "causal": False, "softcap": 0.0, "alibi_slopes": None}
        return plain | {"softmax_scale": call.scale} | _window_and_starts(call)


class FlashAttention3Kernel(_CUDAKernel):
    """FlashAttention-3 (module ``flash_attn_interface``), for compute capability 9.0."""

    name = "flash-attn-3"
    module = "flash_attn_interface"

    def _provider_missing(self) -> str | None:
        capability = torch.cuda.get_device_capability()
        if capability[0] != 9:
            return f"it needs compute capability 9.x, this device has {capability}"
        return _import_problem(self.module)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        run = _module(self.module)._flash_attn_forward
        out, lse, *_ = run(q, k, v, softmax_scale=call.scale, **_window_and_starts(call))
        return out, lse

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call
    ) -> _Triple:
        run = _module(self.module)._flash_attn_backward
        dq, dk, dv = _like(q), _like(k), _like(v)
        options = _window_and_starts(call) | {"softmax_scale": call.scale, "deterministic": _deterministic()}
        run(grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **options)
        return dq, dk, dv


def _call(scale: float, piece: Piece, batch: int, device: torch.device) -> _Call:
    left = -1 if piece.left is None else piece.left
    right = -1 if piece.right is None else piece.right
    if piece.blocks is None:
        return _Call(scale, left, right)
    # A cached tensor must not be born inside a compiler's trace.
    starts = (
        block_starts(batch, piece.blocks, device)
        if torch.compiler.is_compiling()
        else _cached_starts(batch, piece.blocks, device)
    )
    return _Call(scale, left, right, starts, max(piece.blocks.first, piece.blocks.length))


@functools.lru_cache(maxsize=256)
def _cached_starts(batch: int, blocks: Blocks, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return block_starts(batch, blocks, device)


def block_starts(batch: int, blocks: Blocks, device: torch.device) -> Tensor:
    """Where each block of each batch row starts in the flattened sequence, and the end: int32 [batch·blocks + 1]."""
    per_row = blocks.count + (blocks.first > 0)
    row_tokens = blocks.first + blocks.count * blocks.length
    index = torch.arange(batch * per_row + 1, device=device)
    row, block = index // per_row, index % per_row
    if blocks.first:
        inside = torch.where(block == 0, 0, blocks.first + (block - 1) * blocks.length)
    else:
        inside = block * blocks.length
    return (row * row_tokens + inside).to(torch.int32)


def _window_and_starts(call: _Call) -> dict[str, Any]:
    """The keywords that both packages share."""
    options: dict[str, Any] = {"window_size_left": call.left, "window_size_right": call.right}
    if call.starts is not None:
        options |= {"cu_seqlens_q": call.starts, "cu_seqlens_k": call.starts}
        options |= {"max_seqlen_q": call.longest, "max_seqlen_k": call.longest}
    return options


def _prepared(x: Tensor, call: _Call) -> Tensor:
    """Heads padded to a multiple of 8 with a unit last stride, and the batch packed when there are blocks."""
    if x.shape[-1] % 8:
        x = F.pad(x, (0, -x.shape[-1] % 8))
    elif x.stride(-1) != 1:
        x = x.contiguous()
    return x if call.starts is None else x.flatten(0, 1)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _import_problem(name: str) -> str | None:
    try:
        _module(name)
    except (ImportError, OSError) as problem:
        return f"module {name} cannot be imported ({problem})"
    return None
