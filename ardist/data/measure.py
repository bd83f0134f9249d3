"""How fast a dataset can be read on this machine, in the order and with the checks of a run."""

from __future__ import annotations

import time
from typing import Any

from ardist.config.data import DataConfig
from ardist.data.loader import open_loader
from ardist.events import events

_PER_RUN = ("samples", "bytes", "wait_seconds")


def measure_loading(
    config: DataConfig, *, batch_size: int = 64, seconds: float = 10.0, step_seconds: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Read batches of `batch_size` on one rank for `seconds` and return what the loader counted.

    Rates and waiting are those after the first batch, which opens everything: ``samples_per_second``,
    ``megabytes_per_second``, ``wait_seconds``, ``wait_fraction``. A consumer that only takes always waits; with
    `step_seconds` it pauses after every batch as long as a training step would last, so that ``wait_fraction`` says
    what such a run would lose. Adds ``first_batch_seconds`` (opening included), ``batches`` (the first one too),
    ``storage_retries``, and ``substituted``: the latest bad samples.
    """
    begun, retries = time.perf_counter(), events.snapshot().get("storage.retry", 0)
    with open_loader(config, seed=seed, global_batch_size=batch_size) as loader:
        next(loader)
        opened, before, batches = time.perf_counter(), loader.metrics(), 1
        while batches < 2 or time.perf_counter() - begun < seconds:
            time.sleep(step_seconds)
            next(loader)
            batches += 1
        measured, after = time.perf_counter() - opened, loader.metrics()
        gained = {name: after[name] - before[name] for name in _PER_RUN}
        return {
            **after,
            "first_batch_seconds": opened - begun,
            "batches": batches,
            "samples_per_second": gained["samples"] / measured,
            "megabytes_per_second": gained["bytes"] / measured / 1e6,
            "wait_seconds": gained["wait_seconds"],
            "wait_fraction": gained["wait_seconds"] / measured,
            "storage_retries": events.snapshot().get("storage.retry", 0) - retries,
            "substituted": loader.substitutions,
        }
