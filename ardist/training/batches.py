"""From the loader's batch to micro-batches on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ardist.data.batch import Batch


class DeviceCopy:
    """Copies batches to the device on a stream of its own.

    The loader reuses its pinned memory once the next batch is asked for, so the copy must have ended by then. On a
    stream that holds nothing else it ends at once, however far the host is ahead of the device's computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; on a CPU the batch itself."""
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            moved = {name: value.to(self.device, non_blocking=True) for name, value in _tensors(batch).items()}
        self._stream.synchronize()
        for value in moved.values():
            value.record_stream(torch.cuda.current_stream(self.device))
        return replace(batch, **moved)


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive equal parts of a batch, as views."""
    count = len(batch.sample_ids)
    if count % size:
        raise ValueError(f"a batch of {count} samples cannot be cut into micro-batches of {size}")
    tensors = _tensors(batch)
    for first in range(0, count, size):
        yield replace(batch, **{name: value[first : first + size] for name, value in tensors.items()})


def _tensors(batch: Batch) -> dict[str, Any]:
    named = {
        "values": batch.values,
        "sample_ids": batch.sample_ids,
        "class_ids": batch.class_ids,
        "context": batch.context,
    }
    return {name: value for name, value in named.items() if value is not None}
