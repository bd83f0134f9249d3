"""A bundle with tiny random networks, made as an export makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sampler_cases import random_denoiser

from ardist.config.training import DiffusionConfig
from ardist.inference.bundle import SamplerDefaults, write_bundle
from ardist.models.ar_vae import ARVAE, preset
from ardist.models.weights import save_ar_vae


def make_ar_vae(directory: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "tokens_per_frame": 3,
        "codebook_size": 16,
        "codebook_dim": 8,
        "decoder_channels": 8,
    }
    model = ARVAE(preset("tiny", **small | changes))
    with torch.no_grad():
        # A fresh decoder hardly looks at its latents, and hardly shows what it sees.
        for parameter in model.decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=3 * parameter[0].numel() ** -0.5)
        model.pixel_decoder.conv_out.weight.mul_(45)
    save_ar_vae(directory, model)
    return directory


def make_bundle(out: Path, ar_vae: Path | None = None, **changes: Any) -> Path:
    ema, raw = random_denoiser(1, **changes), random_denoiser(2, **changes)
    return write_bundle(
        out,
        denoiser_config=ema.config,
        ema_state=ema.state_dict(),
        raw_state=raw.state_dict(),
        diffusion=DiffusionConfig(),
        ar_vae_dir=ar_vae,
        sampler_defaults=SamplerDefaults(num_frames=4, num_inference_steps=5, difference=2),
        provenance={"step": 12, "dataset": "abc"},
    )
