"""Bytes of one rank: weights, gradients, optimiser, averages, what DeepSpeed copies, and activations, by ZeRO stage.

Each term is a tensor that DeepSpeed 0.19 or our own code makes, found by listing what is alive at the peak of real
ranks; none is a factor fitted to a measurement. Not counted is what kernels of a CPU keep for themselves (10 to 25
MiB).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from ardist.config import TrainConfig
from ardist.config.training import batch_layout
from ardist.training.gradients import accumulates_in_fp32

BUCKET_ELEMENTS = 50_000_000
"""Elements of a reduction bucket of ZeRO 1-3, as the engine sets it; of what ZeRO-3 prefetches, by default."""

PLAIN_BUCKET_ELEMENTS = 500_000_000
"""Elements that DeepSpeed reduces at once where it does not shard gradients: ZeRO-0, and bf16 summed in fp32."""

LIVE_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered because they are needed again soon: DeepSpeed's default."""


@dataclass(frozen=True)
class Memory:
    """Bytes per rank on the device; with offload some of them are on the host instead and not counted here, unless the
    device is the host.

    `gathered`: weights of other ranks during the passes. `reserved`: what is set apart for gradients before there are
    any. `gradients`: most of them at once, with what is reserved. `buffers`: what a reduction needs beside them.
    `update`: gradients in all their forms in the optimiser's step. `snapshots`: what checkpoints are written from.
    """

    weights: int
    gathered: int
    gradients: int
    masters: int
    moments: int
    averages: int
    snapshots: int
    reserved: int
    buffers: int
    update: int
    activations: int

    def beside(self, other: Memory) -> Memory:
        """With what another engine on the same device needs, as if both had their peaks at once."""
        return Memory(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    @property
    def copies(self) -> int:
        """What a reduction and the checkpoints copy."""
        return self.buffers + self.snapshots

    @property
    def total(self) -> int:
        """At the peak: of the passes, of the reduction or of the optimiser's step.

        Activations go as the gradients come, so that only the larger of both counts.
        """
        state = self.weights + self.masters + self.moments + self.averages + self.snapshots
        passes = self.gathered + self.activations + self.reserved
        return state + max(passes, self.gradients + self.buffers, self.update)


def memory_per_rank(
    config: TrainConfig,
    parameters: int,
    world_size: int,
    activations: int,
    *,
    stage: int | None = None,
    gloo: bool = False,
    bucket: int = BUCKET_ELEMENTS,
) -> Memory:
    """Memory of a rank when `parameters` weights are trained on `world_size` ranks.

    ZeRO stage 1 divides the optimiser's state, stage 2 the gradients too, stage 3 the weights too; a sharded optimiser
    keeps an fp32 copy of its share of the weights also when these are fp32 themselves. `gloo`: the device is the host,
    where the copies for checkpoints lie too, and what is offloaded, and where of a bucket only what is used takes
    memory. `bucket`: elements of a reduction bucket of ZeRO 1-3.
    """
    training = config.training
    stage = training.zero_stage if stage is None else stage
    element = 4 if training.precision == "fp32" else 2
    slice_ = -(-parameters // world_size)
    share = parameters if stage == 0 else slice_
    offloaded = training.offload != "none" and not gloo  # where the device is the host nothing leaves it
    weights = element * (slice_ if stage == 3 else parameters)
    gathered = 0
    if stage == 3:
        # What is prefetched arrives in one tensor and is copied from there into the weights.
        gathered = element * (min(parameters, LIVE_ELEMENTS) + min(parameters, BUCKET_ELEMENTS))
    gradients = _gradients(config, parameters, slice_, stage, world_size, gloo, bucket)
    return Memory(
        weights=0 if offloaded and training.offload == "parameters" else weights,
        gathered=gathered,
        gradients=gradients.most,
        masters=0 if offloaded or (stage == 0 and element == 4) else 4 * share,
        moments=0 if offloaded else 8 * share,
        averages=0 if offloaded else 4 * len(training.ema_decays) * slice_,
        snapshots=4 * (3 + len(training.ema_decays)) * slice_ if gloo else 0,
        reserved=gradients.reserved,
        buffers=gradients.buffers,
        update=0 if offloaded else gradients.update,
        activations=activations,
    )


class _Gradients(NamedTuple):
    """What the gradients take, as `Memory` names it."""

    most: int
    reserved: int
    buffers: int
    update: int


def _gradients(
    config: TrainConfig, parameters: int, slice_: int, stage: int, world_size: int, gloo: bool, set_apart: int
) -> _Gradients:
    """Gradients of each of DeepSpeed's optimisers; `slice_`: parameters of one rank."""
    training = config.training.model_copy(update={"zero_stage": stage})
    element = 4 if training.precision == "fp32" else 2
    accumulation = batch_layout(training, world_size)[1]
    sums_in_fp32 = accumulates_in_fp32(config.model_copy(update={"training": training}), accumulation)
    to_fp32 = 0 if element == 4 else 4  # an optimiser of fp32 masters takes gradients of 16 bits converted
    together = min(parameters, PLAIN_BUCKET_ELEMENTS)
    if stage == 0:
        # What is reduced is flattened into a copy first.
        return _Gradients(element * parameters, 0, element * together, (element + to_fp32) * parameters)
    if stage == 1 and sums_in_fp32:
        # BF16_Optimizer: sums of the whole model stay; they are flattened, and the copy is reduced in bf16.
        sums = 4 * parameters
        most = sums + element * parameters
        return _Gradients(most, sums, (4 + element) * together, most)
    bucket = min(parameters, set_apart)
    if stage == 3:
        kept = 4 if sums_in_fp32 else element
        reserved = kept * slice_ + element * (bucket if gloo else set_apart)
        # The bucket is copied in the order of the ranks. gloo reduces one more copy of it; then a rank's part of it is
        # converted where sums are fp32.
        converted = 4 * -(-bucket // world_size) if sums_in_fp32 else 0
        buffers = element * bucket + max(element * bucket if gloo else 0, converted)
        flat = (kept + (0 if sums_in_fp32 else to_fp32)) * slice_
        return _Gradients(reserved, reserved, buffers, reserved + flat)
    # On a GPU two whole buckets are filled in turns; on the host one, of which only what is used takes memory.
    laid = element * bucket if gloo else 2 * element * set_apart
    if stage == 1:
        most = laid + element * (parameters - bucket)
        sums = 0
    else:
        # What was reduced is kept as this rank's share, what was not is still whole.
        sums = 4 * slice_ if sums_in_fp32 else element * slice_ if accumulation > 1 else 0
        most = laid + sums + (0 if sums_in_fp32 else element * slice_ * (parameters - bucket) // parameters)
    # A rank's share is kept parameter by parameter, then made flat, then converted.
    update = sums if sums_in_fp32 else (2 * element + to_fp32) * slice_
    return _Gradients(most, 0 if gloo else laid, element * bucket, update)
