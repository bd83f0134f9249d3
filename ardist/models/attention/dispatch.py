"""One attention function, several backends: chosen by name or by a rule."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from operator import index

import torch
from jaxtyping import Float
from torch import Tensor

from ardist.errors import InvalidValueError, choose
from ardist.models.attention import flash, flex, operator, reference, sdpa
from ardist.models.attention.layout import AttentionLayout
from ardist.models.attention.tracing import trace_time_constant

_ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]] = {
    "reference": reference.attend,
    "sdpa": sdpa.attend,
    "flex": flex.attend,
    "flash": flash.attend,
}
BACKENDS = ("auto", *_ATTEND)
"""Legal backend names."""

FLEX_SMALLEST_HEAD = 16
"""Its CUDA kernel multiplies tiles of at least 16 x 16."""


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    layout: AttentionLayout,
    backend: str = "auto",
) -> Float[Tensor, "b h n d"]:
    """Softmax attention with scale 1/sqrt(d) under the mask of `layout` (paper section 3.3).

    Args:
        q: queries of `layout`: context tokens (if they ask), then the query frames in order.
        k: keys: context tokens, then the key frames in order.
        v: values, as `k`.
        layout: who sees whom.
        backend: one of `BACKENDS`. All give the same result up to the rounding of the dtype.

    Returns:
        Outputs in the dtype of `q`; inside autocast all three inputs are cast to its dtype first.

    Raises:
        InvalidValueError: shapes, dtypes or devices disagree, or the backend is unknown or cannot do this.
    """
    _check(q, k, v, layout)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise InvalidValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; legal: one floating-point dtype for all three"
        )
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    compiling = torch.compiler.is_compiling()
    # While a compiler traces, the number of frames may be symbolic, and nothing should be asked of it.
    dense = not compiling and not _forbids_anything(layout)
    name = _resolve(backend, q.device.type, q.dtype, index(q.shape[-1]), tracked, dense)
    if not operator.serves(name, q.device.type):
        return _ATTEND[name](q, k, v, layout)
    if tracked or compiling:
        return operator.attend(q, k, v, layout, name)
    return operator.attend_directly(q, k, v, layout, name)


def resolve_backend(name: str, layout: AttentionLayout, q: Float[Tensor, "b h n d"]) -> str:
    """The backend that `name` stands for with such queries: `name` itself, or the choice of ``auto``.

    ``auto`` is ``flash`` on CUDA in half precision, where a kernel works and the layout forbids anything at all,
    because it scores no forbidden pair in a fixed number of calls; everywhere else it is ``sdpa``. On CPU that is
    measured: ``sdpa`` is the fastest at every shape of ``benchmarks/attention.py``. On CUDA it is reasoned from the
    number of scored pairs and calls, not timed.

    Raises:
        InvalidValueError: the name is unknown, or the backend cannot serve these queries; legal names are given.
    """
    tracked = torch.is_grad_enabled() and q.requires_grad
    return _resolve(name, q.device.type, q.dtype, q.shape[-1], tracked, not _forbids_anything(layout))


def available_backends(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    requires_grad: bool = False,
) -> dict[str, str | None]:
    """Every backend, and every kernel of ``flash`` as ``flash/<kernel>``, with the reason it does not work, or None."""
    device_type = torch.device(device).type
    result = {name: _problem(name, device_type, dtype, head_dim, requires_grad) for name in _ATTEND}
    for name in flash.KERNELS:
        result[f"flash/{name}"] = flash.unavailable(name, device_type, dtype, head_dim)
    return result


@trace_time_constant
def _resolve(name: str, device_type: str, dtype: torch.dtype, head_dim: int, tracked: bool, dense: bool) -> str:
    return _cached_choice(name, device_type, dtype, head_dim, tracked, dense)


@functools.lru_cache(maxsize=256)
def _cached_choice(name: str, device_type: str, dtype: torch.dtype, head_dim: int, tracked: bool, dense: bool) -> str:
    choose("attention backend", name, BACKENDS)
    if name == "auto":
        half = dtype in (torch.float16, torch.bfloat16)
        suits_flash = device_type == "cuda" and half and not dense
        return "flash" if suits_flash and flash.none_works(device_type, dtype, head_dim) is None else "sdpa"
    problem = _problem(name, device_type, dtype, head_dim, tracked)
    if problem is not None:
        able = [other for other in _ATTEND if _problem(other, device_type, dtype, head_dim, tracked) is None]
        raise InvalidValueError(
            f"attention backend {name!r} cannot serve this: {problem}; legal: auto, {', '.join(able)}"
        )
    return name


@functools.lru_cache(maxsize=1024)
def _forbids_anything(layout: AttentionLayout) -> bool:
    return layout.num_pairs() < layout.num_queries * layout.num_keys


def _problem(name: str, device_type: str, dtype: torch.dtype, head_dim: int, tracked: bool) -> str | None:
    """Why a backend cannot serve such tensors, or None."""
    if name == "flex":
        return _flex_problem(device_type, dtype, head_dim, tracked)
    if name == "flash":
        return flash.none_works(device_type, dtype, head_dim)
    return None


def _flex_problem(device_type: str, dtype: torch.dtype, head_dim: int, tracked: bool) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"FlexAttention takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device_type == "cpu":
        if tracked:
            return "FlexAttention has no gradients on cpu"
        if not _has_compiler():
            return "compiling FlexAttention for cpu needs a C++ compiler"
        return None
    if device_type == "cuda":
        if head_dim < FLEX_SMALLEST_HEAD:
            return f"FlexAttention on cuda takes head dimensions from {FLEX_SMALLEST_HEAD}, not {head_dim}"
        return None if find_spec("triton") else "compiling FlexAttention for cuda needs triton"
    return f"FlexAttention does not run on {device_type}"


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _check(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise InvalidValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "legal: four axes each, [batch, heads, tokens, head dimension]"
        )
    if q.shape[2] != layout.num_queries or k.shape[2] != layout.num_keys or v.shape != k.shape:
        raise InvalidValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; legal for this layout: "
            f"{layout.num_queries} tokens in q, {layout.num_keys} in k and v, as [batch, heads, tokens, head dimension]"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise InvalidValueError(
            f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}; legal: equal but for the tokens"
        )
    if not q.device == k.device == v.device:
        raise InvalidValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}; legal: one device")
