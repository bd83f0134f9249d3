"""Who keeps bad gradients from the optimiser, and in which type they are added up: what follows from a configuration.

Without DeepSpeed, so that a plan of a run can ask too.
"""

from __future__ import annotations

from ardist.config.training import TrainConfig


def uses_device_guard(config: TrainConfig) -> bool:
    """True when our own check, not DeepSpeed's, keeps non-finite gradients from the optimiser.

    Always with ZeRO-0 in fp32, where DeepSpeed checks nothing at all; elsewhere by ``training.guard: device``.
    """
    training = config.training
    return training.guard == "device" or (training.zero_stage == 0 and training.precision == "fp32")


def accumulates_in_fp32(config: TrainConfig, accumulation: int) -> bool:
    """True when gradients of bf16 weights are added up in fp32: sums in bf16 lose what micro-batches agree on least.

    DeepSpeed cannot with ZeRO-0, and not under the device guard with ZeRO-1.
    """
    training = config.training
    if training.precision != "bf16" or training.zero_stage == 0 or training.offload != "none":
        return False
    if training.grad_accumulation == "auto":
        return accumulation > 1 and not uses_device_guard(config)
    return training.grad_accumulation == "fp32"
