"""Small denoisers with every weight random (a fresh one is the identity and predicts zero), and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ardist.config import DenoiserConfig
from ardist.models.denoiser import Denoiser

SMALL: dict[str, Any] = {
    "width": 32,
    "depth": 3,
    "num_heads": 2,
    "tokens_per_frame": 3,
    "latent_channels": 4,
    "max_frames": 16,
}


def random_denoiser(seed: int = 0, **changes: Any) -> Denoiser:
    """A small denoiser in which no weight is zero."""
    model = Denoiser(DenoiserConfig(**SMALL | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def inputs(config: DenoiserConfig, batch: int = 2, frames: int = 5, seed: int = 1) -> dict[str, Tensor]:
    """Keyword arguments of ``forward`` that fit the configuration."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "latents": torch.randn(batch, frames, config.tokens_per_frame, config.latent_channels, generator=generator),
        "timesteps": torch.randint(0, 1000, (batch, frames), generator=generator).sort(dim=1).values,
    }
    if config.context_tokens:
        made["context"] = torch.randn(batch, config.context_tokens, config.context_dim, generator=generator)
    if config.num_classes is not None:
        made["class_ids"] = torch.randint(0, config.num_classes + 1, (batch,), generator=generator)
    return made
