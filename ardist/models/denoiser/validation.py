"""Refuse wrong inputs with the value and the legal ones; shapes on every call, values only when asked."""

from __future__ import annotations

from torch import Tensor

from ardist.config.denoiser import DenoiserConfig
from ardist.errors import InvalidValueError


def check_shapes(
    config: DenoiserConfig,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor | None,
    class_ids: Tensor | None,
) -> None:
    """Compare shapes with the configuration on the host, without looking at any value; raises `InvalidValueError`."""
    expected = (config.tokens_per_frame, config.latent_channels)
    if latents.ndim != 4 or latents.shape[1] < 1 or tuple(latents.shape[2:]) != expected:
        raise InvalidValueError(
            f"latents of shape {tuple(latents.shape)} are illegal; "
            f"legal: (batch, frames >= 1, {expected[0]}, {expected[1]})"
        )
    batch, frames = latents.shape[:2]
    if tuple(timesteps.shape) != (batch, frames) or timesteps.is_floating_point():
        raise InvalidValueError(
            f"timesteps of shape {tuple(timesteps.shape)} and {timesteps.dtype} are illegal; "
            f"legal: one integer per frame, {(batch, frames)}"
        )
    if config.positions == "sincos" and frames > config.max_frames:
        raise InvalidValueError(
            f"{frames} frames do not fit the sincos table; legal: at most max_frames={config.max_frames}"
        )
    if context is not None and tuple(context.shape) != (batch, config.context_tokens, config.context_dim):
        legal = (batch, config.context_tokens, config.context_dim) if config.context_tokens else None
        raise InvalidValueError(f"context of shape {tuple(context.shape)} is illegal; legal: {legal}")
    if class_ids is not None and (config.num_classes is None or tuple(class_ids.shape) != (batch,)):
        legal_ids = f"shape ({batch},)" if config.num_classes is not None else "None, this denoiser has no classes"
        raise InvalidValueError(f"class_ids of shape {tuple(class_ids.shape)} are illegal; legal: {legal_ids}")


def check_values(
    config: DenoiserConfig,
    timesteps: Tensor,
    class_ids: Tensor | None = None,
    *,
    num_timesteps: int = 1000,
    non_decreasing: bool = False,
) -> None:
    """Look at the values: timesteps in [0, T), class ids in [0, num_classes]. Waits for the device; for debugging.

    Args:
        timesteps: [b, f].
        non_decreasing: also refuse a frame that is less noisy than the one before it, which the timestep law ``fopp``
            and the AD schedule never give.

    Raises:
        InvalidValueError: names the first value that is wrong, and what is legal.
    """
    checks = [("timestep", timesteps, num_timesteps)]
    if class_ids is not None and config.num_classes is not None:
        checks.append(("class id", class_ids, config.num_classes + 1))
    for name, values, stop in checks:
        wrong = values[(values < 0) | (values >= stop)]
        if wrong.numel():
            raise InvalidValueError(f"{name} {int(wrong[0])} is illegal; legal: 0 to {stop - 1}")
    if non_decreasing:
        falls = (timesteps[:, 1:] < timesteps[:, :-1]).nonzero()
        if falls.numel():
            clip, frame = (int(index) for index in falls[0])
            before, after = (int(timesteps[clip, frame + step]) for step in (0, 1))
            raise InvalidValueError(
                f"timestep {after} of frame {frame + 1} of clip {clip} is below {before} of the frame before; "
                f"legal: {before} to {num_timesteps - 1}"
            )
