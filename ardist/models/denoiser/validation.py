"""Refuse wrong inputs with the value and the legal ones: shapes on every call, values wherever looking is free."""

from __future__ import annotations

import torch
from torch import Tensor

from ardist.config.denoiser import DenoiserConfig
from ardist.diffusion.fopp import check_timesteps
from ardist.errors import InvalidValueError, check_integer


def check_inputs(
    config: DenoiserConfig,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor | None = None,
    class_ids: Tensor | None = None,
    context_dropped: Tensor | None = None,
    window: int | None = None,
    law: str | None = None,
) -> None:
    """All that ``Denoiser.forward`` refuses: shapes and types always, values where they are on the host.

    Values on an accelerator, or in a program that is being compiled, are left alone: looking at them would wait for
    the device. `check_values` does that on request.

    Raises:
        InvalidValueError: names the argument, its value, and what is legal.
    """
    check_shapes(config, latents, timesteps, context, class_ids, context_dropped)
    if window is not None:
        check_window(config, window)
    if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
        host_ids = class_ids if class_ids is not None and class_ids.device.type == "cpu" else None
        check_values(config, timesteps, host_ids, law=law)


def check_shapes(
    config: DenoiserConfig,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor | None,
    class_ids: Tensor | None,
    context_dropped: Tensor | None = None,
) -> None:
    """Compare shapes and types with the configuration on the host, without looking at any value.

    Raises:
        InvalidValueError: names the argument, its shape and type, and what is legal.
    """
    expected = (config.tokens_per_frame, config.latent_channels)
    if latents.ndim != 4 or latents.shape[1] < 1 or tuple(latents.shape[2:]) != expected:
        raise InvalidValueError(
            f"latents of shape {tuple(latents.shape)} are illegal; "
            f"legal: (batch, frames >= 1, {expected[0]}, {expected[1]})"
        )
    if not latents.is_floating_point():
        raise InvalidValueError(f"latents of type {latents.dtype} are illegal; legal: a floating-point type")
    batch, frames = latents.shape[:2]
    if tuple(timesteps.shape) != (batch, frames) or not _is_integer(timesteps):
        raise InvalidValueError(
            f"timesteps of shape {tuple(timesteps.shape)} and {timesteps.dtype} are illegal; "
            f"legal: one integer per frame, {(batch, frames)}"
        )
    if config.positions == "sincos" and frames > config.max_frames:
        raise InvalidValueError(
            f"{frames} frames do not fit the sincos table; legal: at most max_frames={config.max_frames}"
        )
    check_condition_shapes(config, batch, context, class_ids, context_dropped)


def check_condition_shapes(
    config: DenoiserConfig,
    batch: int,
    context: Tensor | None,
    class_ids: Tensor | None,
    context_dropped: Tensor | None = None,
) -> None:
    """The part of `check_shapes` that is about the conditions of `batch` clips."""
    if context is not None and (
        tuple(context.shape) != (batch, config.context_tokens, config.context_dim) or not context.is_floating_point()
    ):
        size = (batch, config.context_tokens, config.context_dim)
        legal = f"{size}, floating point" if config.context_tokens else "None, this denoiser has no context"
        raise InvalidValueError(
            f"context of shape {tuple(context.shape)} and {context.dtype} is illegal; legal: {legal}"
        )
    if class_ids is not None and (
        config.num_classes is None or tuple(class_ids.shape) != (batch,) or not _is_integer(class_ids)
    ):
        known = config.num_classes is not None
        legal_ids = f"shape ({batch},), integers" if known else "None, this denoiser has no classes"
        raise InvalidValueError(
            f"class_ids of shape {tuple(class_ids.shape)} and {class_ids.dtype} are illegal; legal: {legal_ids}"
        )
    if context_dropped is not None and (
        not config.context_tokens or tuple(context_dropped.shape) != (batch,) or context_dropped.dtype != torch.bool
    ):
        legal_flags = f"shape ({batch},), bool" if config.context_tokens else "None, this denoiser has no context"
        raise InvalidValueError(
            f"context_dropped of shape {tuple(context_dropped.shape)} and {context_dropped.dtype} is illegal; "
            f"legal: {legal_flags}"
        )


def check_window(config: DenoiserConfig, window: int) -> None:
    """A call may narrow the band that the network was trained with, never widen it; raises `InvalidValueError`."""
    check_integer("window", window)
    if config.mask == "bidirectional":
        raise InvalidValueError(f"window={window} is illegal with mask 'bidirectional'; legal: None")
    if window < 1 or (config.window is not None and window > config.window):
        most = "any number" if config.window is None else f"{config.window}, as configured"
        raise InvalidValueError(f"window={window} is illegal; legal: 1 to {most}")


def check_values(
    config: DenoiserConfig, timesteps: Tensor, class_ids: Tensor | None = None, *, law: str | None = None
) -> None:
    """Look at the values: timesteps in [0, T), class ids in [0, num_classes]. Waits for the device.

    Args:
        timesteps: [b, f].
        law: the law that the timesteps follow: what it never gives, such as a frame that is less noisy than the one
            before it under ``fopp``, is refused too.

    Raises:
        InvalidValueError: names the first value that is wrong, and what is legal.
    """
    check_timesteps(law, timesteps, config.num_timesteps)
    if class_ids is not None and config.num_classes is not None:
        wrong = class_ids[(class_ids < 0) | (class_ids > config.num_classes)]
        if wrong.numel():
            raise InvalidValueError(
                f"class id {int(wrong[0])} is illegal; legal: 0 to {config.num_classes - 1}, "
                f"and {config.num_classes} for no class"
            )


def _is_integer(x: Tensor) -> bool:
    return x.dtype in (torch.int64, torch.int32)
