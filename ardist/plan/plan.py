"""From a configuration to numbers: nothing is started, no GPU is needed, the data may still be missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ardist.config import TrainConfig, batch_layout
from ardist.data.manifest import Manifest, load_manifest
from ardist.errors import ArdistError, ConfigError, InvalidValueError
from ardist.models.ar_vae import ARVAE
from ardist.models.ar_vae.flops import ar_vae_flops
from ardist.models.denoiser import Denoiser
from ardist.models.flops import denoiser_flops
from ardist.plan.activations import activation_bytes
from ardist.plan.devices import MEMORY_GB, find_device
from ardist.plan.memory import Memory, memory_per_rank
from ardist.training.dataset import paths
from ardist.training.throughput import peak_flops

STAGES = (0, 1, 2, 3)
HEADROOM = 0.92
"""Part of a device's memory that can be used: the rest is the CUDA context, NCCL and fragments."""


@dataclass(frozen=True)
class Speed:
    """What is to be expected at a given MFU, over all devices."""

    clips_per_second: float
    tokens_per_second: float
    step_seconds: float
    days: float
    read_bytes_per_second: float


@dataclass(frozen=True)
class Plan:
    """All that can be said before a run; what cannot be known is None."""

    task: str
    gpus: int
    device: str
    precision: str
    parameters: int
    num_frames: int
    tokens_per_clip: int
    flops_per_clip: float
    micro_batch_size: int
    accumulation: int
    memory: dict[tuple[int, str], Memory]
    device_bytes: float
    checkpoint_bytes: int
    samples: int | None
    sample_bytes: int
    total_clips: int
    mfu: float
    speed: Speed | None
    chosen: tuple[int, str]
    notes: tuple[str, ...]

    @property
    def total_tokens(self) -> int:
        """Tokens of all clips of the run."""
        return self.total_clips * self.tokens_per_clip

    def fits(self, memory: Memory) -> bool:
        """True when a rank's memory fits on the device."""
        return memory.total <= HEADROOM * self.device_bytes


def make_plan(
    config: TrainConfig, *, gpus: int = 1, device: str = "h200", mfu: float = 0.4, num_frames: int | None = None
) -> Plan:
    """Plan `config` on `gpus` devices.

    Args:
        gpus: number of ranks; must divide the global batch.
        device: a device of the table of peaks, such as ``h200``.
        mfu: expected model FLOP/s utilisation, in (0, 1].
        num_frames: frames of a clip; None: as the dataset's manifest says.

    Raises:
        ConfigError: the batch cannot be divided, or the dataset is not there and `num_frames` is not given.
        InvalidValueError: an argument is out of range, or the device is unknown.
    """
    if not 0 < mfu <= 1:
        raise InvalidValueError(f"mfu={mfu} is out of range; legal: above 0, up to 1")
    name = find_device(device)
    try:
        micro, accumulation = batch_layout(config.training, gpus)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from None
    manifest, notes = _manifest(config, num_frames)
    frames = num_frames if num_frames is not None else manifest.shape[0] if manifest is not None else 1
    parameters = count_parameters(config)
    memory = {
        (stage, mode): memory_per_rank(config, parameters, gpus, activations, stage=stage)
        for mode, activations in _activations(config, frames, micro).items()
        for stage in STAGES
    }
    tokens, flops, sample_bytes = _clip(config, frames, manifest)
    if config.task == "ar_vae":
        notes.append("the activations of an AR-VAE are not counted: its memory is the state's alone")
        notes.append("the FLOPs are those of the AR-VAE, without its losses and its discriminator")
    training = config.training
    clips = training.steps * training.global_batch_size
    peak = peak_flops(name, training.precision)
    speed = None
    if peak is not None:
        rate = mfu * peak * gpus / flops
        speed = Speed(rate, rate * tokens, training.global_batch_size / rate, clips / rate / 86400, rate * sample_bytes)
    return Plan(
        task=config.task,
        gpus=gpus,
        device=name,
        precision=training.precision,
        parameters=parameters,
        num_frames=frames,
        tokens_per_clip=tokens,
        flops_per_clip=flops,
        micro_batch_size=micro,
        accumulation=accumulation,
        memory=memory,
        device_bytes=MEMORY_GB[name] * 1e9,
        checkpoint_bytes=parameters * 4 * (3 + len(training.ema_decays)),
        samples=None if manifest is None else manifest.num_samples,
        sample_bytes=sample_bytes,
        total_clips=clips,
        mfu=mfu,
        speed=speed,
        chosen=(training.zero_stage, training.activation_checkpointing if config.task == "denoiser" else "none"),
        notes=tuple(notes),
    )


def count_parameters(config: TrainConfig) -> int:
    """Parameters of the model, without making it."""
    with torch.device("meta"):
        model: Any = Denoiser(config.denoiser) if config.denoiser and config.task == "denoiser" else None
        model = ARVAE(config.ar_vae) if model is None and config.ar_vae is not None else model
    return sum(parameter.numel() for parameter in model.parameters())


def _manifest(config: TrainConfig, num_frames: int | None) -> tuple[Manifest | None, list[str]]:
    if config.data.mixture:
        longest = [load_manifest(path) for path in paths(config.data)] if num_frames is None else []
        return max(longest, key=lambda one: one.shape[0], default=None), []
    try:
        return load_manifest(config.data.path), []
    except ArdistError as error:
        if num_frames is None:
            raise ConfigError(f"{error}\nWithout the dataset the plan needs --frames, the frames of a clip") from None
        return None, [f"the dataset is not there yet: its size is computed from the configuration ({error})"]


def _activations(config: TrainConfig, frames: int, micro: int) -> dict[str, int]:
    if config.task != "denoiser":
        return {"none": 0}
    return activation_bytes(config, frames, micro)


def _clip(config: TrainConfig, frames: int, manifest: Manifest | None) -> tuple[int, float, int]:
    """Tokens, FLOPs and stored bytes of a clip."""
    if config.task == "denoiser":
        assert config.denoiser is not None
        model = config.denoiser
        shape: tuple[int, ...] = (frames, model.tokens_per_frame, model.latent_channels)
        tokens, flops, element = frames * model.tokens_per_frame, float(denoiser_flops(model, frames).training), 2
    else:
        assert config.ar_vae is not None
        size = config.ar_vae.image_size
        shape, element = (frames, size, size, 3), 1
        trained = min(frames, config.augmentation.frames or frames)
        tokens = trained * (size // config.ar_vae.patch_size) ** 2
        choose = ARVAE.freeze_all_but_temporal if config.trainable == "temporal" else None
        flops = ar_vae_flops(config.ar_vae, trained, (size, size), choose)
    if manifest is not None:
        shape, element = (frames, *manifest.shape[1:]), np.dtype(_NUMPY.get(manifest.dtype, manifest.dtype)).itemsize
    return tokens, flops, int(np.prod(shape)) * element


_NUMPY = {"bfloat16": "uint16"}
