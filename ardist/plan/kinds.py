"""What the steps of a run are of: clips of one dataset, or of several that take turns with batches of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ardist.config import TrainConfig, batch_layout
from ardist.data.buckets import bucket_batches, check_buckets
from ardist.data.manifest import Manifest, load_manifest
from ardist.errors import ArdistError, ConfigError
from ardist.models.ar_vae import ARVAE
from ardist.models.ar_vae.flops import ar_vae_flops
from ardist.models.flops import denoiser_flops
from ardist.training.dataset import paths

_NUMPY = {"bfloat16": "uint16"}


@dataclass(frozen=True)
class Kind:
    """Steps of one sort; `share` of all steps are of it. `samples` is None while the dataset is not there."""

    name: str
    share: float
    frames: int
    size: tuple[int, int]
    """Height and width of a frame; (0, 0) for latents."""
    global_batch: int
    micro_batch: int
    tokens: int
    flops: float
    sample_bytes: int
    samples: int | None


def kinds_of(config: TrainConfig, gpus: int, num_frames: int | None) -> tuple[list[Kind], list[str]]:
    """The kinds of steps, that of the longest clips first, and what a reader should know about them.

    With `num_frames` all clips have as many, and a dataset may be missing. Raises `ConfigError` when a batch cannot be
    divided, or a dataset is not there.
    """
    try:
        _, accumulation = batch_layout(config.training, gpus)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from None
    manifests, notes = _manifests(config, num_frames)
    batch = config.training.global_batch_size
    by_step = num_frames is None and config.data.mixture_by == "step" and len(manifests) > 1
    if not by_step:
        first = manifests[0] if manifests else None
        samples = sum(one.num_samples for one in manifests) if manifests else None
        return [_kind(config, "clips", 1.0, first, num_frames, batch, gpus, accumulation, samples)], notes
    batches = (batch,) * len(manifests)
    if config.data.tokens_per_batch is not None:
        batches = bucket_batches(manifests, config.data.tokens_per_batch, lanes=config.data.lanes)
        micro = config.training.micro_batch_size
        check_buckets(manifests, batches, world_size=gpus, global_batch_size=batch, micro_batch_size=micro)
    total = sum(part.weight for part in config.data.mixture)
    kinds = [
        _kind(config, part.path, part.weight / total, one, None, size, gpus, accumulation, one.num_samples)
        for part, one, size in zip(config.data.mixture, manifests, batches, strict=True)
    ]
    return sorted(kinds, key=lambda kind: -kind.tokens), notes


def _manifests(config: TrainConfig, num_frames: int | None) -> tuple[list[Manifest], list[str]]:
    try:
        return [load_manifest(path) for path in paths(config.data)], []
    except ArdistError as error:
        if num_frames is None:
            raise ConfigError(f"{error}\nWithout the dataset the plan needs --frames, the frames of a clip") from None
        return [], [f"the dataset is not there yet: its size is computed from the configuration ({error})"]


def _kind(
    config: TrainConfig,
    name: str,
    share: float,
    manifest: Manifest | None,
    num_frames: int | None,
    batch: int,
    gpus: int,
    accumulation: int,
    samples: int | None,
) -> Kind:
    frames = num_frames if num_frames is not None else manifest.shape[0] if manifest is not None else 1
    if config.task == "denoiser":
        assert config.denoiser is not None
        model = config.denoiser
        shape: tuple[int, ...] = (frames, model.tokens_per_frame, model.latent_channels)
        size, element, trained = (0, 0), 2, frames
        tokens, flops = frames * model.tokens_per_frame, float(denoiser_flops(model, frames).training)
    else:
        assert config.ar_vae is not None
        side = config.ar_vae.image_size
        size = (side, side) if manifest is None else (manifest.shape[1], manifest.shape[2])
        shape, element = (frames, *size, 3), 1
        trained = min(frames, config.augmentation.frames or frames)
        tokens = trained * (size[0] // config.ar_vae.patch_size) * (size[1] // config.ar_vae.patch_size)
        choose = ARVAE.freeze_all_but_temporal if config.trainable == "temporal" else None
        flops = ar_vae_flops(config.ar_vae, trained, size, choose)
    if manifest is not None:
        shape, element = (frames, *manifest.shape[1:]), np.dtype(_NUMPY.get(manifest.dtype, manifest.dtype)).itemsize
    return Kind(
        name=name,
        share=share,
        frames=trained,
        size=size,
        global_batch=batch,
        micro_batch=batch // gpus // accumulation,
        tokens=tokens,
        flops=flops,
        sample_bytes=int(np.prod(shape)) * element,
        samples=samples,
    )
