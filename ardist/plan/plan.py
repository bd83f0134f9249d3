"""From a configuration to numbers: nothing is started, no GPU is needed, the data may still be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from ardist.config import TrainConfig
from ardist.errors import InvalidValueError
from ardist.models.ar_vae import ARVAE
from ardist.models.ar_vae.discriminator import PatchDiscriminator
from ardist.models.denoiser import Denoiser
from ardist.plan.activations import activation_bytes
from ardist.plan.autoencoder import autoencoder_bytes
from ardist.plan.devices import CPU, MEMORY_GB, find_device
from ardist.plan.kinds import Kind, kinds_of
from ardist.plan.memory import Memory, memory_per_rank
from ardist.training.adversary_config import adversary_config
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
    kinds: tuple[Kind, ...]
    """What the steps are of; the numbers of a clip and of a micro-batch above are those of the first, the longest."""
    memory: dict[tuple[int, str], Memory]
    device_bytes: float
    checkpoint_bytes: int
    samples: int | None
    sample_bytes: int
    total_clips: int
    total_tokens: int
    mfu: float
    speed: Speed | None
    chosen: tuple[int, str]
    notes: tuple[str, ...]

    def fits(self, memory: Memory) -> bool:
        """True when a rank's memory fits on the device."""
        return memory.total <= HEADROOM * self.device_bytes


def make_plan(
    config: TrainConfig, *, gpus: int = 1, device: str = "h200", mfu: float = 0.4, num_frames: int | None = None
) -> Plan:
    """Plan `config` on `gpus` devices.

    Args:
        gpus: number of ranks; must divide the global batch.
        device: a device of the table of peaks, such as ``h200``; ``cpu``: processes of this machine.
        mfu: expected model FLOP/s utilisation, in (0, 1].
        num_frames: frames of a clip; None: as the dataset's manifest says.

    Raises:
        ConfigError: the batch cannot be divided, or the dataset is not there and `num_frames` is not given.
        InvalidValueError: an argument is out of range, or the device is unknown.
    """
    if not 0 < mfu <= 1:
        raise InvalidValueError(f"mfu={mfu} is out of range; legal: above 0, up to 1")
    name = find_device(device)
    kinds, notes = kinds_of(config, gpus, num_frames)
    longest = kinds[0]
    parameters, training = count_parameters(config), config.training
    checkpointing = training.activation_checkpointing
    if config.task == "ar_vae":
        notes.append("the FLOPs are those of the AR-VAE, without its losses and its discriminator")
        checkpointing = "none" if checkpointing == "none" else "full"
    if name == CPU:
        notes.append("memory is what a rank needs beyond its bare process, of which there are as many as ranks")
    return Plan(
        task=config.task,
        gpus=gpus,
        device=name,
        precision=training.precision,
        parameters=parameters,
        num_frames=longest.frames,
        tokens_per_clip=longest.tokens,
        flops_per_clip=longest.flops,
        micro_batch_size=longest.micro_batch,
        accumulation=longest.global_batch // gpus // longest.micro_batch,
        kinds=tuple(kinds),
        memory=_memory(config, gpus, kinds, name),
        device_bytes=_device_bytes(name),
        checkpoint_bytes=count_trained(config) * 4 * (3 + len(training.ema_decays))
        + 4 * (parameters - count_trained(config)),
        samples=None if longest.samples is None else sum(kind.samples or 0 for kind in kinds),
        sample_bytes=longest.sample_bytes,
        total_clips=round(training.steps * _per_step(kinds)),
        total_tokens=round(training.steps * _per_step(kinds, "tokens")),
        mfu=mfu,
        speed=_speed(config, gpus, name, mfu, kinds),
        chosen=(training.zero_stage, checkpointing),
        notes=tuple(notes),
    )


def count_parameters(config: TrainConfig) -> int:
    """Parameters of the model, without making it."""
    with torch.device("meta"):
        model: Any = Denoiser(config.denoiser) if config.denoiser and config.task == "denoiser" else None
        model = ARVAE(config.ar_vae) if model is None and config.ar_vae is not None else model
    return sum(parameter.numel() for parameter in model.parameters())


def count_trained(config: TrainConfig) -> int:
    """Parameters that the run trains; the others are frozen."""
    if config.task == "denoiser" or config.trainable == "all":
        return count_parameters(config)
    assert config.ar_vae is not None
    with torch.device("meta"):
        model = ARVAE(config.ar_vae)
    model.freeze_all_but_temporal()
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _activations(config: TrainConfig, kinds: Sequence[Kind]) -> dict[str, int]:
    """Bytes of the kind of step that needs most, by checkpointing mode."""
    needed = [
        activation_bytes(config, kind.frames, kind.micro_batch)
        if config.task == "denoiser"
        else autoencoder_bytes(config, kind.frames, kind.size, kind.micro_batch)
        for kind in kinds
    ]
    return {mode: max(one[mode] for one in needed) for mode in needed[0]}


def _memory(config: TrainConfig, gpus: int, kinds: Sequence[Kind], device: str) -> dict[tuple[int, str], Memory]:
    trained = count_trained(config)
    frozen = (4 if config.training.precision == "fp32" else 2) * (count_parameters(config) - trained)
    adversary = _adversary(config, gpus, device == CPU)
    table = {}
    for mode, activations in _activations(config, kinds).items():
        for stage in STAGES:
            memory = memory_per_rank(config, trained, gpus, activations, stage=stage, gloo=device == CPU)
            memory = replace(memory, weights=memory.weights + frozen)
            table[stage, mode] = memory.beside(adversary[stage]) if adversary else memory
    return table


def _adversary(config: TrainConfig, gpus: int, gloo: bool) -> dict[int, Memory]:
    """What the engine of the AR-VAE's discriminator takes by ZeRO stage of the run; its passes are the task's."""
    losses = config.ar_vae_loss
    if config.task != "ar_vae" or losses.adversarial_weight <= 0:
        return {}
    with torch.device("meta"):
        model = PatchDiscriminator(losses.discriminator_channels, losses.discriminator_layers)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    table = {}
    for stage in STAGES:
        # It has no averages, and is laid out by the stage that the run would have.
        training = config.training.model_copy(update={"zero_stage": stage, "ema_decays": ()})
        engine = adversary_config(config.model_copy(update={"training": training}), numbers)
        bucket = engine.deepspeed["zero_optimization"].get("reduce_bucket_size", 0)
        memory = memory_per_rank(engine, numbers, gpus, 0, gloo=gloo, bucket=bucket)
        # A checkpoint gets it whole from every rank.
        table[stage] = replace(memory, snapshots=4 * 3 * numbers if gloo else 0)
    return table


def _speed(config: TrainConfig, gpus: int, device: str, mfu: float, kinds: Sequence[Kind]) -> Speed | None:
    peak = None if device == CPU else peak_flops(device, config.training.precision)
    if peak is None:
        return None
    seconds = _per_step(kinds, "flops") / (mfu * peak * gpus)
    return Speed(
        clips_per_second=_per_step(kinds) / seconds,
        tokens_per_second=_per_step(kinds, "tokens") / seconds,
        step_seconds=seconds,
        days=config.training.steps * seconds / 86400,
        read_bytes_per_second=_per_step(kinds, "sample_bytes") / seconds,
    )


def _per_step(kinds: Sequence[Kind], quantity: str | None = None) -> float:
    """Mean over steps of the clips of a step, or of what they have together of `quantity`."""
    return sum(kind.share * kind.global_batch * (1 if quantity is None else getattr(kind, quantity)) for kind in kinds)


def _device_bytes(device: str) -> float:
    return float(psutil.virtual_memory().total) if device == CPU else MEMORY_GB[device] * 1e9
