"""The flash backend: the block-causal mask through the best FlashAttention kernel that works here.

Providers rely on functions that their projects do not promise to keep. So a kernel is used only after it has
reproduced the reference, values and all three gradients, on a tiny case on the device at hand.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.events import events
from ardist.models.attention import reference
from ardist.models.attention.cpu_kernel import CPUKernel
from ardist.models.attention.cuda_kernels import FlashAttention2Kernel, FlashAttention3Kernel, TorchCUDAKernel
from ardist.models.attention.kernels import FlashKernel
from ardist.models.attention.layout import AttentionLayout
from ardist.models.attention.merging import block_causal
from ardist.models.attention.tracing import trace_time_constant

KERNELS: dict[str, FlashKernel] = {
    kernel.name: kernel for kernel in (FlashAttention3Kernel(), FlashAttention2Kernel(), TorchCUDAKernel(), CPUKernel())
}
"""All kernels by name, best first."""


def attend(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], layout: AttentionLayout
) -> Float[Tensor, "b h n d"]:
    """Attention through the best kernel that works for these tensors.

    Raises:
        InvalidValueError: no kernel works for this device, dtype and head dimension; the reason of each is given.
    """
    kernel = KERNELS[select(q.device.type, q.dtype, q.shape[-1])]
    return block_causal(q, k, v, layout, kernel)


@trace_time_constant
def select(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Name of the best kernel that works for such tensors.

    Raises:
        InvalidValueError: none does; the message says why for each.
    """
    for name in KERNELS:
        if unavailable(name, device_type, dtype, head_dim) is None:
            return name
    raise InvalidValueError(
        f"{none_works(device_type, dtype, head_dim)}; legal attention backends: auto, sdpa, reference"
    )


def none_works(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no kernel works for such tensors, or None when one does."""
    reasons = []
    for name in KERNELS:
        reason = unavailable(name, device_type, dtype, head_dim)
        if reason is None:
            return None
        reasons.append(f"{name}: {reason}")
    return f"no flash kernel works here ({'; '.join(reasons)})"


@functools.lru_cache(maxsize=256)
def unavailable(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel `name` is not used for such tensors, or None; the first call tries it on a tiny case."""
    kernel = KERNELS[name]
    reason = kernel.missing(device_type, dtype)
    if reason is not None:
        return reason
    try:
        error = _worst_error(kernel, device_type, dtype, head_dim)
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as problem:
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
    else:
        # Half precision rounds P and dS before its matrix products: a few units in the last place of the largest value.
        tolerance = 64 * torch.finfo(dtype).eps if dtype.itemsize > 2 else 8 * torch.finfo(dtype).eps
        reason = (
            None if error <= tolerance else f"its results are off by {error:.1e} (relative; legal: {tolerance:.1e})"
        )
    if reason is not None:
        events.count("attention.kernel_rejected", kernel=name, device=device_type, dtype=dtype, reason=reason)
    return reason


def _worst_error(kernel: FlashKernel, device_type: str, dtype: torch.dtype, head_dim: int) -> float:
    """Largest error of output and gradients against the reference, relative to the largest value of each."""
    worst = 0.0
    layouts = (
        AttentionLayout.training(3, 5, context_tokens=4),
        AttentionLayout(4, (2, 5), (0, 5), context_tokens=3, context_queries=False, window=2),
    )
    # Runs outside whatever mode the first caller happens to be in, and draws nothing from the random generators.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        for layout in layouts:
            inputs = [_wave(tokens, head_dim, phase) for phase, tokens in enumerate(_lengths(layout))]
            q, k, v, grad = (x.to(device_type, dtype) for x in inputs)
            exact = torch.promote_types(dtype, torch.float32)
            a, b, c = (x.detach().requires_grad_() for x in (q, k, v))
            out = block_causal(a, b, c, layout, kernel)
            found = (out, *torch.autograd.grad(out, (a, b, c), grad))
            a, b, c = (x.to(exact, copy=True).requires_grad_() for x in (q, k, v))
            out = reference.attend(a, b, c, layout)
            expected = (out, *torch.autograd.grad(out, (a, b, c), grad.to(exact)))
            for x, y in zip(found, expected, strict=True):
                difference = (x.detach().double() - y.detach().double()).abs().max() / y.detach().double().abs().max()
                worst = max(worst, math.inf if difference.isnan() else float(difference))
    return worst


def _lengths(layout: AttentionLayout) -> tuple[int, int, int, int]:
    return layout.num_queries, layout.num_keys, layout.num_keys, layout.num_queries


def _wave(tokens: int, head_dim: int, phase: int) -> Tensor:
    """[2, 2, tokens, head_dim] irregular values of unit size."""
    count = 4 * tokens * head_dim
    values = torch.sin(torch.arange(count, dtype=torch.float64) * (1.7 + 0.31 * phase) + phase) * math.sqrt(2)
    return values.view(2, 2, tokens, head_dim)
