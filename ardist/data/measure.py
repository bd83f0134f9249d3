"""How fast a dataset can be read on this machine, in the order and with the checks of a run."""

from __future__ import annotations

import time
from typing import Any

from ardist.config.data import DataConfig
from ardist.data.loader import open_loader


def measure_loading(
    config: DataConfig, *, batch_size: int = 64, seconds: float = 10.0, seed: int = 0
) -> dict[str, Any]:
    """Read batches of `batch_size` on one rank for `seconds` and return the loader's metrics.

    Adds ``first_batch_seconds`` (opening included), ``batches``, and ``substituted``: the latest bad samples.
    """
    begun = time.perf_counter()
    with open_loader(config, seed=seed, global_batch_size=batch_size) as loader:
        next(loader)
        first = time.perf_counter() - begun
        batches = 1
        while time.perf_counter() - begun < seconds:
            next(loader)
            batches += 1
        return {
            "first_batch_seconds": first,
            "batches": batches,
            **loader.metrics(),
            "substituted": loader.substitutions,
        }
