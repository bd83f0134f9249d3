"""Numbers between two log points."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ardist.training.distributed import World


class Window:
    """Sums over the micro-batches since the last log point, kept on the device: adding makes nobody wait."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._micro_batches = 0
        self.steps = 0
        self.data_seconds = 0.0
        self.other_seconds = 0.0
        self.began = time.perf_counter()

    def add(self, loss: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Add one micro-batch's numbers."""
        for name, value in {"loss": loss.detach(), **metrics}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._micro_batches += 1

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent here as a wait for the loader."""
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began

    def means(self, world: World) -> dict[str, Any]:
        """Means over micro-batches, steps and ranks: one reduction and one host read (collective)."""
        names = sorted(self._sums)
        if not names:
            return {}
        flat = torch.cat([self._sums[name].reshape(-1) for name in names]) / self._micro_batches
        values, result, position = world.mean(flat).tolist(), {}, 0
        for name in names:
            size = self._sums[name].numel()
            part = values[position : position + size]
            result[name] = part if self._sums[name].ndim else part[0]
            position += size
        return result
