"""Numbers between two log points."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ardist.training.distributed import World


class Window:
    """Sums over the micro-batches since the last log point, kept on the device: adding makes nobody wait.

    longest: frames of the run's longest clips.
    """

    def __init__(self, longest: int = 0) -> None:
        self.longest = longest
        # By name and length: with images and videos in turn, what is counted per frame has two lengths.
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._counts: Counter[tuple[str, int]] = Counter()
        self.steps = 0
        self.clips: Counter[int] = Counter()
        """Clips that were trained over all ranks, by their number of frames."""
        self.data_seconds = 0.0
        self.other_seconds = 0.0
        self.began = time.perf_counter()

    def add(self, loss: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Add one micro-batch's numbers."""
        for name, value in {"loss": loss.detach(), **metrics}.items():
            key = (name, value.numel())
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
            self._counts[key] += 1

    def stepped(self, frames: int, clips: int) -> None:
        """Count one optimiser step over so many clips of so many frames, of all ranks together."""
        self.steps += 1
        self.clips[frames] += clips

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent here as a wait for the loader."""
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began

    def means(self, world: World) -> dict[str, Any]:
        """Means over micro-batches, steps and ranks: one reduction and one host read (collective).

        What is counted per frame has the plain name for the run's longest clips, and for others their number of frames
        behind it, whatever else this window holds: the first frame of a clip and an image are two curves.
        """
        keys = sorted(self._sums)
        if not keys:
            return {}
        flat = torch.cat([self._sums[key].reshape(-1) / self._counts[key] for key in keys])
        values, result, position = world.mean(flat).tolist(), {}, 0
        for name, size in keys:
            part = values[position : position + size]
            shown = f"{name}_{size}" if name.endswith("per_frame") and size < self.longest else name
            result[shown] = part if self._sums[name, size].ndim else part[0]
            position += size
        return result
