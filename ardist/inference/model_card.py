"""The README of a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ardist.config.denoiser import DenoiserConfig
from ardist.config.training import DiffusionConfig


def model_card(
    denoiser: DenoiserConfig,
    diffusion: DiffusionConfig,
    sampler: Mapping[str, Any],
    ar_vae: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> str:
    """A model card in Markdown: what it is, how to sample, how it was trained, what it cannot do."""
    conditions = [f"one of {denoiser.num_classes} classes"] if denoiser.num_classes is not None else []
    if denoiser.context_tokens:
        conditions.append(f"{denoiser.context_tokens} context tokens of {denoiser.context_dim} channels")
    classes = " --class-id 0" if denoiser.num_classes is not None else ""
    if ar_vae is None:
        pixels = "No AR-VAE is included: the bundle makes latents, not pixels."
    else:
        pixels = f"The AR-VAE in this bundle turns them into frames of {ar_vae.get('image_size')} pixels a side."
    lines = [
        "# Asynchronous video diffusion model",
        "",
        "A denoiser in which every frame has a noise level of its own, trained and sampled as in AR-Diffusion "
        "([arXiv 2503.07418](https://arxiv.org/abs/2503.07418)), made with ardist.",
        "",
        "## Use",
        "",
        "```",
        f"ardist sample --bundle . --out video.mp4 --frames {sampler['num_frames']} "
        f"--difference {sampler['difference']}{classes}",
        "```",
        "",
        "`--difference 0` denoises all frames together, larger values one after another; longer videos than the "
        "training clips, `--prefix` (a video or an image to continue) and `--stream` work too.",
        "",
        "## Model",
        "",
        f"- width {denoiser.width}, depth {denoiser.depth}, {denoiser.num_heads} heads; mask `{denoiser.mask}`, "
        f"positions `{denoiser.positions}`, residual `{denoiser.residual}`",
        f"- a frame is {denoiser.tokens_per_frame} tokens of {denoiser.latent_channels} channels. {pixels}",
        f"- conditions: {' and '.join(conditions) or 'none'}",
        f"- predicts {diffusion.target}; {diffusion.schedule} noise over {diffusion.num_timesteps} timesteps; "
        f"trained with the timestep law {json.dumps(diffusion.law)}",
        "- `denoiser.safetensors` holds averaged weights (use these), `denoiser_raw.safetensors` the last ones",
        "",
        "## Where it comes from",
        "",
        *[f"- {name}: {json.dumps(value, default=str)}" for name, value in provenance.items()],
        *([] if provenance else ["- not recorded"]),
        "",
        "## Limits",
        "",
        "It knows the kind of video it was trained on and nothing else; what it shows never happened. Videos longer "
        "than the training clips drift, since a frame sees no further back than the window.",
        "",
    ]
    return "\n".join(lines)
