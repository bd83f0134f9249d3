"""The streaming loader: an endless iterator of verified batches whose state is what was consumed."""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from ardist.config.data import DataConfig
from ardist.data.batch import Batch, RowBuffer
from ardist.data.errors import ShardError
from ardist.data.health import SampleHealth, Substitution
from ardist.data.manifest import Manifest, load_manifest
from ardist.data.order import Cursor, LaneOrder, Places, check_layout
from ardist.data.pipeline import OrderedPipeline
from ardist.data.read_ahead import ReadAhead
from ardist.data.reader import SampleReader
from ardist.data.remote_source import open_source
from ardist.data.source import ShardSource, missing_or_resized
from ardist.errors import ConfigError, DataError
from ardist.events import events

__all__ = ["Batch", "StreamingLoader", "read_samples"]

_log = logging.getLogger("ardist.data")
_MAX_BUFFERS: Final = 32
_MAX_TRIES: Final = 96


@dataclass
class _Step:
    """What one buffer of the pipeline is filled with."""

    epoch: int
    consumed: int
    places: Places
    lanes: Any
    substitutions: dict[int, Substitution] = field(default_factory=dict)


class StreamingLoader:
    """Batches of m = G / R samples for one rank, in the exact order of `ardist.data.order`, for ever.

    config: where and how to read. seed: of the order. global_batch_size: G, a multiple of config.lanes.
    rank, world_size: this process's part; R divides G. manifest: the dataset's, where it is already loaded.

    Epochs follow each other by themselves. ``state_dict()`` covers the batches handed out so far and nothing that
    was read ahead; it is the same on every rank and may be loaded on any legal number of ranks and global batch.
    The tensors of a batch are reused: they are valid until the next one is asked for.

    Raises `ConfigError` for an illegal layout (with the legal values), `DataError` for a dataset that is incomplete
    at the start or too damaged later.
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
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of {world_size} ranks (0..{world_size - 1})")
        self.config, self.rank, self.world_size, self.global_batch_size = config, rank, world_size, global_batch_size
        self.manifest = load_manifest(config.path) if manifest is None else manifest
        check_layout(
            self.manifest.num_samples, lanes=config.lanes, global_batch_size=global_batch_size, world_size=world_size
        )
        self.batch_size = global_batch_size // world_size
        self._buffer_count = _buffer_count(config, self.batch_size, self.manifest)
        counts = np.fromiter((shard.n for shard in self.manifest.shards), np.int64, len(self.manifest.shards))
        self._order = LaneOrder(counts, seed=seed, lanes=config.lanes, window=config.window)
        self._cursor = Cursor(self.manifest.digest(), seed, config.lanes, config.window)
        self._source: ShardSource = open_source(config, self.manifest)
        lanes_here = -(-config.lanes // world_size) + 1
        num_classes = len(self.manifest.classes) if self.manifest.classes is not None else None
        self._reader = SampleReader(self._source, max_open=_max_open(4 * lanes_here), num_classes=num_classes)
        self._missing = self._check_files()
        self._health = SampleHealth(config.max_bad_fraction)
        self._order_lock = threading.Lock()
        self._ahead = self._cursor.epoch, self._cursor.consumed
        self._pipeline: OrderedPipeline[_Step, RowBuffer] | None = None
        self._read_ahead: ReadAhead | None = None
        self._process = os.getpid()
        self._closed = False
        self._started = time.perf_counter()
        self._samples = self._waited = 0.0

    def _check_files(self) -> set[str]:
        """Compare the sizes of all files with the manifest; returns the shards to do without, or raises."""
        problems = missing_or_resized(self._source)
        if not problems:
            return set()
        listing = "\n".join(f"  {name} {problem}" for name, problem in problems.items())
        if self.config.missing_shards == "fail":
            raise DataError(
                f"{len(problems)} files of {self.config.path} are not as the manifest says "
                f"(data.missing_shards=substitute would do without them):\n{listing}"
            )
        gone = set()
        for number, shard in enumerate(self.manifest.shards):
            if shard.name in problems:
                self._reader.refuse(number, ShardError(shard.name, "missing", problems[shard.name]))
                gone.add(shard.name)
        events.count("loader.missing_shard", len(gone), shards=sorted(gone))
        if len(gone) == len(self.manifest.shards):
            raise DataError(f"no shard of {self.config.path} can be read:\n{listing}")
        return gone

    def __len__(self) -> int:
        """Steps of one epoch."""
        return self._order.steps(self.global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this loader is closed")
        if self._pipeline is None or self._process != os.getpid():
            self._start()
        assert self._pipeline is not None
        step, buffer = self._pipeline.take()
        self._health.served(step.lanes, step.substitutions)
        self._cursor.epoch, self._cursor.consumed = step.epoch, step.consumed + self.global_batch_size
        self._samples += self.batch_size
        return Batch(
            values=buffer.values,
            sample_ids=torch.from_numpy(buffer.keys.view(np.int64).copy()),
            epoch=step.epoch,
            class_ids=torch.from_numpy(buffer.class_ids.copy()) if self.manifest.classes is not None else None,
        )

    def _start(self) -> None:
        """Start reading at the cursor. After a fork the parent's threads and locks are left behind, not used."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._reader.after_fork()
        self._order_lock = threading.Lock()
        self._ahead = self._cursor.epoch, self._cursor.consumed
        # The lanes of a rank's slots: with G = k L places a step, lane l has the slots [l k, (l + 1) k).
        per_lane = self.global_batch_size // self.config.lanes
        lanes = range(self.rank * self.batch_size // per_lane, ((self.rank + 1) * self.batch_size - 1) // per_lane + 1)
        self._read_ahead = ReadAhead(
            self._order, lanes, self._reader.prepare, self.config.fetch_threads, self._order_lock
        )
        pinned = torch.cuda.is_available()
        shape, dtype = self.manifest.shape, self.manifest.dtype
        buffers = [RowBuffer(self.batch_size, shape, dtype, pinned) for _ in range(self._buffer_count)]
        self._pipeline = OrderedPipeline(
            self._plan, self._fill, buffers, min(self.config.fetch_threads, self._buffer_count - 1), "ardist-read"
        )

    def _plan(self) -> _Step:
        count, size = self.global_batch_size, self.batch_size
        epoch, consumed = Cursor("", 0, 1, 1, *self._ahead).before_batch(self._order.stream_length, count)
        with self._order_lock:
            places = self._order.take(epoch, consumed, count, self.rank * size, (self.rank + 1) * size)
        self._ahead = epoch, consumed + count
        if self._read_ahead is not None:
            self._read_ahead.advance(epoch, (consumed + count - 1) // self.config.lanes)
        return _Step(epoch, consumed, places, places.positions // self._order.lane_length)

    def _fill(self, step: _Step, buffer: RowBuffer) -> None:
        for bad in self._reader.read(step.places.shards, step.places.rows, buffer):
            step.substitutions[bad.slot] = self._substitute(step, bad.slot, bad.error, buffer)

    def _substitute(self, step: _Step, slot: int, error: ShardError, buffer: RowBuffer) -> Substitution:
        """Fill `slot` with a good sample near it; `DataError` when none can be found."""
        position = int(step.places.positions[slot])
        for attempt in range(_MAX_TRIES):
            with self._order_lock:
                other = self._order.substitute(step.epoch, position, attempt)
                place = self._order.locate(step.epoch, np.array([other]))
            if other == position or self._reader.read(place.shards, place.rows, buffer, slot):
                continue
            return Substitution(
                epoch=step.epoch,
                position=position,
                lane=int(step.lanes[slot]),
                shard=error.shard,
                offset=error.offset,
                sample=error.key,
                reason=error.reason,
                detail=error.detail,
                substitute=f"{int(buffer.keys[slot]):016x}",
                attempts=attempt + 1,
                known_missing=error.shard in self._missing,
            )
        raise DataError(f"no good sample was found in place of a bad one after {_MAX_TRIES} tries: {error}")

    def state_dict(self) -> dict[str, Any]:
        """What was consumed, as about 150 bytes of JSON; identical on every rank."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after what `state` says was consumed; `CheckpointError` when it is of another order."""
        self._cursor.load_state_dict(dict(state))
        self._stop()

    def metrics(self) -> dict[str, float]:
        """Totals since the start: samples, rates, seconds the consumer waited, substitutions, retries, cache."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        sample_bytes = RowBuffer.bytes_for(1, self.manifest.shape, self.manifest.dtype)
        waited = self._waited + (self._pipeline.wait_seconds if self._pipeline is not None else 0.0)
        return {
            "samples": self._samples,
            "samples_per_second": self._samples / seconds,
            "megabytes_per_second": self._samples * sample_bytes / seconds / 1e6,
            "wait_seconds": waited,
            "wait_fraction": waited / seconds,
            "read_retries": float(self._reader.retries),
            **self._source.metrics(),
            **self._health.metrics(),
        }

    @property
    def substitutions(self) -> list[Substitution]:
        """The latest bad samples (at most 1000) and what was served in their place."""
        return list(self._health.substitutions)

    def _stop(self) -> None:
        if self._process == os.getpid():
            if self._pipeline is not None:
                self._waited += self._pipeline.wait_seconds
                self._pipeline.close()
            if self._read_ahead is not None:
                self._read_ahead.close()
        self._pipeline = self._read_ahead = None

    def close(self) -> None:
        """Stop the threads, close every file; safe to call twice."""
        self._closed = True
        self._stop()
        self._reader.close()

    def __enter__(self) -> StreamingLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _buffer_count(config: DataConfig, batch_size: int, manifest: Manifest) -> int:
    """Batch buffers that fit in the bound: one for the consumer and at least one to read ahead."""
    size = RowBuffer.bytes_for(batch_size, manifest.shape, manifest.dtype)
    if 2 * size > config.prefetch_bytes:
        raise ConfigError(
            f"two batches of {batch_size} samples {list(manifest.shape)} ({manifest.dtype}) take {2 * size} bytes, "
            f"more than data.prefetch_bytes={config.prefetch_bytes}; legal: {2 * size} or more, or a smaller batch"
        )
    return min(config.prefetch_bytes // size, _MAX_BUFFERS)


def _max_open(wanted: int) -> int:
    """Shards to hold open: enough for the lanes, within half of what the system lets this process open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = 4096 if soft == resource.RLIM_INFINITY else soft // 2
    return max(8, min(max(64, wanted), limit))


def read_samples(dataset_url: str | os.PathLike[str], indices: Sequence[int] | None = None) -> Batch:
    """A whole small dataset, or the samples at `indices` [0, N), in the manifest's order, in memory of its own.

    Raises `DataError` for the first sample that is not good, `ConfigError` for an index outside the dataset.
    """
    config = DataConfig(path=os.fspath(dataset_url))
    manifest = load_manifest(config.path)
    wanted = np.arange(manifest.num_samples) if indices is None else np.asarray(indices, np.int64)
    if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= manifest.num_samples:
        raise ConfigError(f"sample indices must be in 0..{manifest.num_samples - 1} of {config.path}, at least one")
    ends = np.cumsum([shard.n for shard in manifest.shards])
    shards = np.searchsorted(ends, wanted, side="right")
    rows = wanted - (ends[shards] - np.array([manifest.shards[number].n for number in shards]))
    buffer = RowBuffer(len(wanted), manifest.shape, manifest.dtype)
    source = open_source(config, manifest)
    num_classes = len(manifest.classes) if manifest.classes is not None else None
    reader = SampleReader(source, num_classes=num_classes)
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
    )
