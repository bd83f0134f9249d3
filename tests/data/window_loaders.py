"""Loaders over a small data set whose windows fit in memory, or do not; for the tests of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ardist.config.data import DataConfig
from ardist.data.loader import BatchLoader, open_loader
from ardist.data.manifest import load_manifest
from ardist.data.tar_index import TarIndex
from ardist.data.window_arena import WindowArena

COUNTS = [50, 31, 1, 40]


def loader_of(
    dataset: Path | list[Path], *, batch: int = 8, rank: int = 0, world_size: int = 1, **options: Any
) -> BatchLoader:
    settings: dict[str, Any] = {"lanes": 4, "window": 8, "prefetch_bytes": 2**20, "max_bad_fraction": 1.0}
    if isinstance(dataset, list):
        weights = [0.5, 0.3, 0.2]
        settings["mixture"] = [{"path": str(path), "weight": w} for path, w in zip(dataset, weights, strict=False)]
    else:
        settings["path"] = str(dataset)
    config = DataConfig(**{**settings, **options})
    return open_loader(config, seed=1, global_batch_size=batch, rank=rank, world_size=world_size)


def whole_windows(loader: BatchLoader) -> bool:
    return all(loader._whole_windows)


def without_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowArena, "bytes_for", staticmethod(lambda *_: None))


def stream(loader: BatchLoader, steps: int) -> list[tuple[int, bytes, list[int], list[int]]]:
    """Everything about the next batches, bit for bit."""
    taken = []
    for _ in range(steps):
        batch = next(loader)
        labels = [] if batch.class_ids is None else batch.class_ids.tolist()
        taken.append((batch.epoch, batch.values.numpy().tobytes(), batch.sample_ids.tolist(), labels))
    return taken


def corrupt(folder: Path, numbers: list[int]) -> None:
    """Flip a byte of the members of these samples."""
    manifest = load_manifest(folder)
    ends = np.cumsum([shard.n for shard in manifest.shards])
    for number in numbers:
        shard = int(np.searchsorted(ends, number, side="right"))
        entry = manifest.shards[shard]
        row = number - int(ends[shard]) + entry.n
        offset = int(TarIndex.open(folder / entry.index_name).records["offset"][row])
        data = bytearray((folder / entry.name).read_bytes())
        data[offset + 150] ^= 4
        (folder / entry.name).write_bytes(data)
