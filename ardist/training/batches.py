"""From the loader's batch to micro-batches on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

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


def cut(inputs: Mapping[str, torch.Tensor], parts: int) -> Iterator[dict[str, torch.Tensor]]:
    """So many consecutive equal parts, as views, of tensors with one row per sample."""
    count = len(next(iter(inputs.values())))
    size, rest = divmod(count, parts)
    if rest or not size:
        raise ValueError(f"a batch of {count} samples cannot be cut into {parts} equal micro-batches")
    for first in range(0, count, size):
        yield {name: value[first : first + size] for name, value in inputs.items()}


def single_clips(batch: Batch) -> Iterator[Batch]:
    """The samples of a batch one by one, as batches of one."""
    for part in cut(_tensors(batch), len(batch.sample_ids)):
        yield replace(batch, **cast(dict[str, Any], part))


def _tensors(batch: Batch) -> dict[str, Any]:
    named = {
        "values": batch.values,
        "sample_ids": batch.sample_ids,
        "class_ids": batch.class_ids,
        "context": batch.context,
    }
    return {name: value for name, value in named.items() if value is not None}
