"""From a checkpoint of the published layout to a bundle: what ``ardist import-released`` does."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ardist.config.loading import apply_override
from ardist.config.training import DiffusionConfig
from ardist.errors import CheckpointError
from ardist.inference.bundle import SamplerDefaults, write_bundle
from ardist.models.denoiser import preset
from ardist.models.released import convert_released_state_dict
from ardist.models.weights import weights_digest

EMA_KEYS, RAW_KEYS = ("ema", "model_ema", "ema_state_dict"), ("model", "state_dict", "module")
"""Where checkpoints that hold more than one state dict keep the averaged and the last weights."""


def import_released(
    checkpoint: Path,
    out: Path,
    *,
    preset_name: str = "released-xl",
    changes: Sequence[str] = (),
    ar_vae: Path | None = None,
) -> Path:
    """Write the bundle `out` from published weights, verify it, and return its path.

    Args:
        checkpoint: ``.safetensors``, or a torch file that holds nothing but tensors in plain containers: it is read
            with ``weights_only=True``, so no code inside it can run. Either a state dict, or averaged and last weights
            under the keys `EMA_KEYS` and `RAW_KEYS`; a single state becomes the bundle's averaged weights.
        preset_name: the architecture, a preset of the denoiser.
        changes: settings of the denoiser over the preset's, each ``name=value``.
        ar_vae: a bundle with the AR-VAE that decodes the latents.

    Raises:
        CheckpointError: the file cannot be read safely, or its weights are not of this architecture.
        ConfigError: the preset or a change is illegal.
    """
    settings: dict[str, Any] = {}
    for change in changes:
        apply_override(settings, change)
    config = preset(preset_name, **settings)
    averaged, last = _states(_read(checkpoint), str(checkpoint))
    frames = min(config.window or config.max_frames, config.max_frames)
    return write_bundle(
        out,
        denoiser_config=config,
        ema_state=convert_released_state_dict(averaged, config),
        raw_state=None if last is None else convert_released_state_dict(last, config),
        diffusion=DiffusionConfig(),
        ar_vae_dir=ar_vae,
        sampler_defaults=SamplerDefaults(num_frames=frames, window=frames),
        provenance={"imported_from": checkpoint.name, "sha256": weights_digest(checkpoint)},
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} holds more than tensors in plain containers, which could run code; "
            f"legal: save its state dict alone, best as .safetensors ({str(error).splitlines()[0]})"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}; legal: a mapping of names to tensors")
    return content


def _states(content: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(averaged weights, last weights if there are both); a single state stands for the averaged one."""
    found = [
        next((content[key] for key in keys if isinstance(content.get(key), Mapping)), None)
        for keys in (EMA_KEYS, RAW_KEYS)
    ]
    states = [state for state in found if state is not None] or [content]
    plain = [_plain(state, source) for state in states]
    return plain[0], plain[1] if len(plain) == 2 else None


def _plain(state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """A state dict in fp32, without the prefix that data-parallel wrappers put before every name."""
    others = sorted(str(name) for name, value in state.items() if not isinstance(value, Tensor))
    if others or not state:
        raise CheckpointError(
            f"{source} is no state dict: not a tensor: {', '.join(others[:5]) or 'nothing at all'}; legal: names and "
            f"tensors, alone or under one of {', '.join(EMA_KEYS + RAW_KEYS)}"
        )
    wrapped = all(str(name).startswith("module.") for name in state)
    return {str(name).removeprefix("module." if wrapped else ""): value.float() for name, value in state.items()}
