"""Small random changes of training frames, the same for all frames of a clip: mirror, shift, colour; noise on latents.

What a sample is given is a function of (seed, epoch, sample id), as all randomness here. Few videos make an
autoencoder remember frames; these changes leave every frame a plausible one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from ardist.config.training import AugmentationConfig
from ardist.diffusion import counter_rng
from ardist.diffusion.counter_rng import Purpose

Drawn = dict[str, Tensor]


def draw(config: AugmentationConfig, seed: int, epoch: int, sample_ids: Int64[Tensor, " b"]) -> Drawn:
    """What each sample is given; keys only for what is switched on."""
    drawn: Drawn = {}
    if config.flip:
        drawn["flip"] = counter_rng.bernoulli(seed, epoch, sample_ids, Purpose.FLIP, 0.5)
    if config.shift:
        drawn["shift"] = counter_rng.integers(
            seed, epoch, sample_ids, Purpose.SHIFT, (2,), -config.shift, config.shift + 1
        )
    if config.colour:
        spread = 2.0 * counter_rng.uniform(seed, epoch, sample_ids, Purpose.COLOUR, (2, 3)) - 1.0
        drawn["colour"] = config.colour * spread
    return drawn


def latent_noise(
    config: AugmentationConfig, seed: int, epoch: int, sample_ids: Int64[Tensor, " b"], shape: tuple[int, int, int]
) -> Float[Tensor, "b f l c"]:
    """What is added to each clip's latents of `shape` [f, l, c]: normal noise, in an amount of the clip's own."""
    amount = counter_rng.uniform(seed, epoch, sample_ids, Purpose.LATENT_NOISE_AMOUNT, (1, 1, 1))
    noise = counter_rng.normal(seed, epoch, sample_ids, Purpose.LATENT_NOISE, shape)
    return config.latent_noise * amount * noise


def choose_frames(
    config: AugmentationConfig,
    values: Shaped[Tensor, "b f ..."],
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, " b"],
) -> Shaped[Tensor, "b f2 ..."]:
    """``augmentation.frames`` different frames of each clip, drawn at random and kept in their order."""
    if config.frames is None or config.frames >= values.shape[1]:
        return values
    order = counter_rng.uniform(seed, epoch, sample_ids, Purpose.FRAME_CHOICE, (values.shape[1],)).argsort(dim=1)
    chosen = order[:, : config.frames].sort(dim=1).values
    return values[torch.arange(len(values), device=values.device)[:, None], chosen]


def augment(frames: Float[Tensor, "b f 3 h w"], drawn: Mapping[str, Tensor]) -> Float[Tensor, "b f 3 h w"]:
    """Frames in [0, 1], changed as drawn: mirrored left-right, shifted with mirrored borders, channels scaled."""
    if "flip" in drawn:
        frames = torch.where(drawn["flip"][:, None, None, None, None], frames.flip(-1), frames)
    if "shift" in drawn:
        frames = _shift(frames, drawn["shift"])
    if "colour" in drawn:
        gain, offset = drawn["colour"].to(frames.dtype)[:, :, None, :, None, None].unbind(1)
        frames = ((frames - 0.5) * (1.0 + gain) + 0.5 + 0.5 * offset).clamp(0.0, 1.0)
    return frames


def _shift(frames: Tensor, shift: Tensor) -> Tensor:
    batch, count, channels, height, width = frames.shape
    device = frames.device
    rows = _mirrored(torch.arange(height, device=device) + shift[:, :1], height)
    columns = _mirrored(torch.arange(width, device=device) + shift[:, 1:], width)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    flat = frames.reshape(batch, count * channels, height * width)
    moved = flat.gather(2, index[:, None].expand(-1, count * channels, -1))
    return moved.view(batch, count, channels, height, width)


def _mirrored(position: Tensor, size: int) -> Tensor:
    """Positions in (-size, 2 * size - 1) folded back at the borders, the border itself not repeated."""
    return (size - 1) - ((size - 1) - position.abs()).abs()
