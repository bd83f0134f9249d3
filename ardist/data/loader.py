"""The streaming loader: one dataset, exact order, state of one integer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ardist.config.data import DataConfig
from ardist.data.batch import Batch, RowBuffer
from ardist.data.batch_loader import BatchLoader
from ardist.data.dataset_stream import DatasetStream, lanes_of_rank
from ardist.data.manifest import Manifest, load_manifest
from ardist.data.mixture import MixedLoader
from ardist.data.order import Cursor, batch_start, check_layout, check_rank
from ardist.data.reader import SampleReader
from ardist.data.remote_source import open_source
from ardist.data.steps import Block, Piece, uniform_block
from ardist.errors import ConfigError, DataError

__all__ = ["Batch", "BatchLoader", "MixedLoader", "StreamingLoader", "open_loader", "read_samples"]


class StreamingLoader(BatchLoader):
    """Batches of m = G / R samples for one rank, in the exact order of `ardist.data.order`, for ever.

    config: where and how to read. seed: of the order. global_batch_size: G, a multiple of config.lanes.
    rank, world_size: this process's part; R divides G. manifest: the dataset's, where it is already loaded.

    Epochs follow each other by themselves. A state may be loaded on any legal number of ranks and global batch: what
    was consumed is a prefix of the same stream. Raises `ConfigError` for an illegal layout (with the legal values),
    `DataError` for a dataset that is incomplete at the start or too damaged later.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        manifest: Manifest | None = None,
    ) -> None:
        check_rank(rank, world_size)
        manifest = load_manifest(config.path) if manifest is None else manifest
        check_layout(
            manifest.num_samples, lanes=config.lanes, global_batch_size=global_batch_size, world_size=world_size
        )
        lanes = lanes_of_rank(config.lanes, rank, world_size)
        stream = DatasetStream(config, config.path, manifest, seed=seed, rank=rank, lanes=lanes)
        super().__init__(config, [stream], global_batch_size=global_batch_size, rank=rank, world_size=world_size)
        self._order = stream.order
        self._cursor = Cursor(manifest.digest(), seed, config.lanes, config.window)

    def __len__(self) -> int:
        """Steps of one epoch."""
        return self._order.steps(self.global_batch_size)

    def _position(self) -> tuple[int, int]:
        return self._cursor.epoch, self._cursor.consumed

    def _consume(self, position: tuple[int, int]) -> None:
        self._cursor.epoch, self._cursor.consumed = position

    def _plan_block(self, position: tuple[int, int], most: int) -> Block:
        count, rows = self.global_batch_size, self.batch_size
        epoch, consumed = batch_start(*position, count, self._order.stream_length)
        # Up to the end of the window, so that a block does not hold on to two of them, and of the epoch.
        each, window = count // self.config.lanes, self._order.window
        in_window = (window - consumed // self.config.lanes % window) // each
        steps = max(1, min(most, in_window, (self._order.stream_length - consumed) // count))
        taken = self.streams[0].take(epoch, consumed, count, self.rank * rows, (self.rank + 1) * rows, batches=steps)
        after = [(epoch, consumed + (number + 1) * count) for number in range(steps)]
        return uniform_block(Piece(0, epoch, taken, 0), after)

    def state_dict(self) -> dict[str, Any]:
        return self._cursor.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        self._cursor.load_state_dict(state)


def open_loader(
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """The loader of one dataset, or of a mixture where `config` has one.

    With a token budget (data.tokens_per_batch) the batches differ in size: ``global_batch_sizes`` of the loader.
    """
    kind = MixedLoader if config.mixture else StreamingLoader
    return kind(config, seed=seed, global_batch_size=global_batch_size, rank=rank, world_size=world_size)


def read_samples(dataset_url: str | os.PathLike[str], indices: Sequence[int] | None = None) -> Batch:
    """A whole small dataset, or the samples at `indices` [0, N), in the manifest's order, in memory of its own.

    Raises `DataError` for the first sample that is not good, `ConfigError` for an index outside the dataset.
    """
    config = DataConfig(path=os.fspath(dataset_url))
    manifest = load_manifest(config.path)
    wanted = np.arange(manifest.num_samples) if indices is None else np.asarray(indices, np.int64)
    if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= manifest.num_samples:
        raise ConfigError(f"sample indices must be in 0..{manifest.num_samples - 1} of {config.path}, at least one")
    counts = np.array([shard.n for shard in manifest.shards])
    ends = np.cumsum(counts)
    shards = np.searchsorted(ends, wanted, side="right")
    rows = wanted - (ends[shards] - counts[shards])
    buffer = RowBuffer(len(wanted), manifest.shape, manifest.dtype, context_shape=manifest.context_shape)
    num_classes = len(manifest.classes) if manifest.classes is not None else None
    reader = SampleReader(open_source(config, config.path, manifest), num_classes=num_classes)
    try:
        bad = reader.read(shards, rows, buffer)
    finally:
        reader.close()
    if bad:
        raise DataError(f"{len(bad)} of {len(wanted)} samples of {config.path} are bad, first: {bad[0].error}")
    return Batch(
        values=buffer.values,
        sample_ids=torch.from_numpy(buffer.keys.view(np.int64)),
        epoch=0,
        class_ids=torch.from_numpy(buffer.class_ids) if manifest.classes is not None else None,
        context=None if buffer.context is None else buffer.context.values,
    )
