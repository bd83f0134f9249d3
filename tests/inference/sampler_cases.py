"""An uncached sampler written out plainly: every row runs the network on all frames, with the band as a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ardist.config import DenoiserConfig
from ardist.diffusion.counter_rng import Purpose, normal
from ardist.diffusion.noise import NoiseSchedule
from ardist.models.denoiser import Denoiser

SMALL: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "tokens_per_frame": 3,
    "latent_channels": 4,
}


def random_denoiser(seed: int = 0, std: float = 0.15, **changes: Any) -> Denoiser:
    """A small denoiser with random weights whose predictions have the size of latents."""
    model = Denoiser(DenoiserConfig(**SMALL | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


@torch.no_grad()
def plain_sample(
    denoiser: Denoiser,
    num_frames: int,
    steps: int,
    difference: int,
    *,
    batch: int = 1,
    seed: int = 0,
    window: int | None = None,
    guidance_scale: float = 1.0,
    prefix: Tensor | None = None,
    context: Tensor | None = None,
    class_ids: Tensor | None = None,
) -> Tensor:
    """The specification, frame by frame and row by row, with nothing shared with the sampler but its network."""
    config = denoiser.config
    length, channels = config.tokens_per_frame, config.latent_channels
    abar = NoiseSchedule.create().alphas_cumprod
    given = 0 if prefix is None else prefix.shape[1]
    x = normal(seed, 0, torch.arange(batch), Purpose.SAMPLER_NOISE, (num_frames, length, channels))
    if prefix is not None:
        x[:, :given] = prefix
    spacing = 1000 // steps
    done = [steps] * given + [0] * (num_frames - given)
    for row in range(1, steps + (num_frames - given - 1) * difference + 1):
        before = list(done)
        for frame in range(given, num_frames):
            done[frame] = min(max(row - difference * (frame - given), 0), steps)
        label = [999 if k == 0 else 1 + spacing * (steps - k) for k in done]
        timesteps = torch.tensor([label] * batch)

        def network(drop: bool, x: Tensor = x, timesteps: Tensor = timesteps) -> Tensor:
            null_class = None if class_ids is None else torch.full_like(class_ids, config.num_classes or 0)
            return denoiser(
                x,
                timesteps,
                None if drop else context,
                null_class if drop else class_ids,
                window=window,
            )

        x0 = network(False)
        if guidance_scale != 1:
            unconditional = network(True)
            x0 = unconditional + guidance_scale * (x0 - unconditional)
        for frame in range(num_frames):
            if done[frame] == before[frame]:
                continue
            a = abar[label[frame]]
            a_next = abar[0] if done[frame] == steps else abar[label[frame] - spacing]
            eps = (x[:, frame].double() - a.sqrt() * x0[:, frame]) / (1 - a).sqrt()
            x[:, frame] = a_next.sqrt() * x0[:, frame] + (1 - a_next).sqrt() * eps
    return x
