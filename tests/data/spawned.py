"""What a process started afresh does: it imports this module and knows nothing of its parent."""

from __future__ import annotations

import sys
import threading
from typing import Any

from ardist.config.data import DataConfig
from ardist.data.loader import BatchLoader, open_loader


def taken(loader: BatchLoader, steps: int) -> list[tuple[int, list[int], bytes]]:
    """Epoch, ids and values of the next steps."""
    batches = []
    for _ in range(steps):
        batch = next(loader)
        batches.append((batch.epoch, batch.sample_ids.tolist(), batch.values.numpy().tobytes()))
    return batches


def serve_rank(
    config: DataConfig, state: dict[str, Any] | None, steps: int, rank: int, world_size: int, queue: Any
) -> None:
    """Put (rank, batches of some steps, the state after them, threads left, names of the test's modules here)."""
    with open_loader(config, seed=9, global_batch_size=24, rank=rank, world_size=world_size) as loader:
        if state is not None:
            loader.load_state_dict(state)
        batches = taken(loader, steps)
        after = loader.state_dict()
    here = sorted(name for name in sys.modules if name.startswith("test_"))
    queue.put((rank, batches, after, threading.active_count(), here))
