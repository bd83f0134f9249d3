"""Bytes of one rank: weights, gradients, optimiser, averages, buffers of collectives and activations, by ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass

from ardist.config import TrainConfig

BUCKET_ELEMENTS = 50_000_000
"""Elements of a reduction bucket, as the engine sets it."""

LIVE_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered because they are needed again soon: DeepSpeed's default."""


@dataclass(frozen=True)
class Memory:
    """Bytes per rank on the device; with offload some of them are on the host instead and not counted here."""

    weights: int
    gradients: int
    masters: int
    moments: int
    averages: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        """At the peak: activations go as the gradients come, so that only the larger of both counts."""
        state = self.weights + self.masters + self.moments + self.averages
        return state + max(self.activations, self.gradients) + self.buffers


def memory_per_rank(
    config: TrainConfig,
    parameters: int,
    world_size: int,
    activations: int,
    *,
    stage: int | None = None,
    gloo: bool = False,
) -> Memory:
    """Memory of a rank when `parameters` weights are trained on `world_size` ranks.

    ZeRO stage 1 divides the optimiser's state, stage 2 the gradients too, stage 3 the weights too; a sharded optimiser
    keeps an fp32 copy of its share of the weights also when these are fp32 themselves. `gloo`: collectives run on the
    host, where gloo needs a scratch copy of what it reduces and holds on to the last tensor it reduced (measured).
    """
    training = config.training
    stage = training.zero_stage if stage is None else stage
    element = 4 if training.precision == "fp32" else 2
    slice_ = -(-parameters // world_size)
    share = parameters if stage == 0 else slice_
    bucket = min(parameters, BUCKET_ELEMENTS)
    weights = element * parameters
    gradients = element * parameters
    buffers = element * bucket * (1 + 2 * gloo) if world_size > 1 or stage else 0
    if stage >= 2:
        # What was reduced is kept as this rank's share, what was not is still whole.
        gradients = element * (bucket + slice_ * (parameters - bucket) // parameters)
    if stage == 3:
        weights = element * (slice_ + min(parameters, LIVE_ELEMENTS))
        buffers += element * -(-bucket // world_size)  # what a reduce-scatter gives
    offloaded = training.offload != "none"
    return Memory(
        weights=0 if training.offload == "parameters" else weights,
        gradients=gradients,
        masters=0 if offloaded or (stage == 0 and element == 4) else 4 * share,
        moments=0 if offloaded else 8 * share,
        averages=0 if offloaded else 4 * len(training.ema_decays) * slice_,
        buffers=buffers,
        activations=activations,
    )
