"""How the engine of the AR-VAE's discriminator is configured: what its training and the plan of its memory go by."""

from __future__ import annotations

import math

from ardist.config import TrainConfig

_BUCKET_STEP = 2**16
"""DeepSpeed wants buckets of a multiple of a small power of two."""


def adversary_config(config: TrainConfig, numbers: int) -> TrainConfig:
    """The run's configuration as far as the engine of a discriminator of `numbers` weights goes by it.

    Nothing is gained by putting so few weights away, on other ranks (ZeRO-3) or on the host, nor by compiling them. The
    device guard lets the autoencoder's bad steps be skipped too, and never makes the host wait.
    """
    training = config.training.model_copy(
        update={
            "zero_stage": min(config.training.zero_stage, 2),
            "precision": "fp32",
            "offload": "none",
            "guard": "device",
            "spike_policy": "off",
            "compile": False,
        }
    )
    # Buckets that hold all of it, instead of hundreds of MB for a model of 11.
    size = math.ceil(numbers / _BUCKET_STEP) * _BUCKET_STEP
    buckets = {"reduce_bucket_size": size, "allgather_bucket_size": size} if training.zero_stage else {}
    return config.model_copy(update={"training": training, "deepspeed": {"zero_optimization": buckets}})
