"""One micro-batch of the largest kind before step 1: what would fail in an hour fails in the first minute.

Memory that does not suffice and kernels that do not compile show here, with the clips of that dataset of a mixture
whose micro-batches have the most tokens. Nothing is learned and no state changes: gradients flow to the inputs, not
into the weights' own.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from ardist import fault
from ardist.data.batch import Batch
from ardist.data.buckets import tokens_of
from ardist.data.manifest import Manifest
from ardist.data.sample import TORCH_DTYPES
from ardist.errors import HardwareError

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

_log = logging.getLogger("ardist.training")


def dry_run(trainer: Trainer) -> None:
    """Run the largest micro-batch forward and backward (collective under ZeRO-3).

    Raises `HardwareError` that names the size when memory does not suffice. Of the AR-VAE, whose adversary learns
    within the loss, nothing is run.
    """
    if trainer.config.task != "denoiser":
        return
    manifest, clips = _largest(trainer)
    frames = manifest.shape[0]
    began = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[trainer.world.device] if trainer.world.device.type == "cuda" else []):
            fault.point("dry_run.memory")
            _forward_and_backward(trainer, _batch(manifest, clips, trainer.world.device))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise HardwareError(
            f"a micro-batch of {clips} clips of {frames} frames does not fit into the memory of rank "
            f"{trainer.world.rank}: {error}. Lower training.micro_batch_size, raise training.zero_stage, or set "
            "training.activation_checkpointing; ardist plan shows what each of them saves"
        ) from error
    if trainer.world.is_main:
        seconds = time.perf_counter() - began
        _log.info("dry run of %d clips of %d frames: %.1f s", clips, frames, seconds)


def _largest(trainer: Trainer) -> tuple[Manifest, int]:
    """Dataset and number of clips of the micro-batch with the most tokens, context included; of equals the longest."""
    parts = trainer.world.size * trainer.engine.accumulation
    clips = [batch // parts for batch in trainer.loader.global_batch_sizes]
    return max(
        zip(trainer.data.manifests, clips, strict=True),
        key=lambda pair: (pair[1] * tokens_of(pair[0]), pair[0].shape[0]),
    )


def _batch(manifest: Manifest, clips: int, device: torch.device) -> Batch:
    values = torch.zeros(clips, *manifest.shape, dtype=TORCH_DTYPES[manifest.dtype], device=device)
    classes = torch.zeros(clips, dtype=torch.int64, device=device) if manifest.classes else None
    return Batch(values, torch.arange(clips, device=device), 0, classes)


def _forward_and_backward(trainer: Trainer, batch: Batch) -> None:
    inputs = trainer.objective.prepare(batch)
    inputs = {
        name: value.detach().requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()
    }
    # The model itself, not the engine: after a backward through that one, DeepSpeed reduces gradients that nobody made.
    loss, _ = trainer.objective.loss(trainer.engine.module, inputs)
    differentiable = [value for value in inputs.values() if value.requires_grad]
    torch.autograd.grad(loss, differentiable, allow_unused=True)
    if trainer.world.device.type == "cuda":
        # The gradients of the weights come on top of what is there now.
        held = sum(parameter.numel() * parameter.element_size() for parameter in trainer.engine.module.parameters())
        del loss
        torch.empty(held, dtype=torch.uint8, device=trainer.world.device)
        torch.cuda.synchronize(trainer.world.device)
