"""What every loader shares: an ordered pipeline of planned steps, state of what was consumed, metrics, closing."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ardist import fault
from ardist.config.data import DataConfig
from ardist.data.batch import Batch, RowBuffer
from ardist.data.dataset_stream import DatasetStream, Taken
from ardist.data.health import SampleHealth, Substitution
from ardist.data.manifest import Manifest
from ardist.data.order import Places
from ardist.data.pipeline import OrderedPipeline
from ardist.data.sanity import LatentSanity
from ardist.errors import ConfigError

_MAX_BUFFERS: Final = 32


class Piece(NamedTuple):
    """Places of one dataset and epoch that fill consecutive rows of a batch, beginning with `slot`."""

    dataset: int
    epoch: int
    taken: Taken
    slot: int

    @property
    def places(self) -> Places:
        """Where they are."""
        return self.taken.places


@dataclass
class Step:
    """What one rank reads for one optimiser step. `after`: the position once it is consumed."""

    pieces: list[Piece]
    epoch: int
    after: Any
    substitutions: dict[int, Substitution] = field(default_factory=dict)


class BatchLoader(ABC):
    """Endless iterator of this rank's batches; a subclass says which samples make a step.

    ``state_dict()`` covers the batches handed out so far and nothing that was read ahead; it is the same on every
    rank. The tensors of a batch are reused: they are valid until the next one is asked for. A child process made by a
    fork continues by itself from where the parent was.
    """

    def __init__(
        self,
        config: DataConfig,
        streams: Sequence[DatasetStream],
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.config, self.streams = config, tuple(streams)
        self.rank, self.world_size, self.global_batch_size = rank, world_size, global_batch_size
        self.batch_size = global_batch_size // world_size
        self._health = SampleHealth(config.max_bad_fraction)
        self._sanity = [LatentSanity(stream.manifest, stream.path) for stream in self.streams]
        self._shapes = list(dict.fromkeys((stream.manifest.shape, stream.manifest.dtype) for stream in self.streams))
        self._whole_windows = False
        self._buffer_count = self._count_buffers()
        self._pipeline: OrderedPipeline[Step, list[RowBuffer]] | None = None
        self._planned: Any = None
        self._process, self._closed = os.getpid(), False
        self._started = time.perf_counter()
        self._samples = self._waited = 0.0
        self._bytes = 0.0

    @property
    def manifest(self) -> Manifest:
        """The dataset's manifest; of a mixture, that of the first dataset."""
        return self.streams[0].manifest

    @abstractmethod
    def _position(self) -> Any:
        """What was consumed, as a value that `_plan_step` understands."""

    @abstractmethod
    def _consume(self, position: Any) -> None:
        """Make `position` what was consumed."""

    @abstractmethod
    def _plan_step(self, position: Any) -> Step:
        """The step that follows `position`. Called by one thread at a time, in order."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What was consumed, as a few hundred bytes of JSON; identical on every rank."""

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None:
        """Continue from `state`, or raise `CheckpointError`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after what `state` says was consumed; `CheckpointError` when it is of another order."""
        self._load(dict(state))
        self._stop()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("this loader is closed")
        if self._pipeline is None or self._process != os.getpid():
            self._start()
        assert self._pipeline is not None
        step, buffers = self._pipeline.take()
        buffer = buffers[self._buffer_of(step)]
        self._health.served(self._lanes(step), step.substitutions)
        for piece in step.pieces:
            self._sanity[piece.dataset].look(buffer.values[piece.slot : piece.slot + len(piece.places.positions)])
        self._consume(step.after)
        self._samples += self.batch_size
        self._bytes += buffer.values.nbytes
        return self._batch(step, buffer)

    def _batch(self, step: Step, buffer: RowBuffer) -> Batch:
        labelled = any(self.streams[piece.dataset].num_classes is not None for piece in step.pieces)
        return Batch(
            values=buffer.values,
            sample_ids=torch.from_numpy(buffer.keys.view(np.int64).copy()),
            epoch=step.epoch,
            class_ids=torch.from_numpy(buffer.class_ids.copy()) if labelled else None,
        )

    def _buffer_of(self, step: Step) -> int:
        manifest = self.streams[step.pieces[0].dataset].manifest
        return self._shapes.index((manifest.shape, manifest.dtype))

    def _lanes(self, step: Step) -> npt.NDArray[np.int64]:
        """A number for the lane of every row, different for every dataset."""
        return np.concatenate(
            [
                piece.places.positions // self.streams[piece.dataset].order.lane_length
                + piece.dataset * self.config.lanes
                for piece in step.pieces
            ]
        )

    def _start(self) -> None:
        """Start reading at what was consumed. After a fork the parent's threads and locks are left behind."""
        if self._process != os.getpid():
            self._process = os.getpid()
            for stream in self.streams:
                stream.after_fork()
        self._planned = self._position()
        for stream in self.streams:
            stream.begin(whole_windows=self._whole_windows)
        # From windows in memory one thread copies faster than two, which would wait for Python's lock in turns.
        threads = 1 if self._whole_windows else min(self.config.fetch_threads, self._buffer_count - 1)
        self._pipeline = OrderedPipeline(
            self._plan, self._fill, self._make_buffer, self._buffer_count, threads, "ardist-read"
        )

    def _make_buffer(self) -> list[RowBuffer]:
        """Room for one batch of any of the datasets."""
        pinned = torch.cuda.is_available()
        return [RowBuffer(self.batch_size, shape, dtype, pinned) for shape, dtype in self._shapes]

    def _plan(self) -> Step:
        step = self._plan_step(self._planned)
        self._planned = step.after
        return step

    def _fill(self, step: Step, buffers: list[RowBuffer]) -> None:
        fault.point("data.fill")
        buffer = buffers[self._buffer_of(step)]
        filled = 0
        try:
            for piece in step.pieces:
                filled += 1
                stream = self.streams[piece.dataset]
                step.substitutions.update(stream.fill(piece.epoch, piece.taken, buffer, piece.slot))
        finally:
            for piece in step.pieces[filled:]:
                self.streams[piece.dataset].let_go(piece.taken)

    def _count_buffers(self) -> int:
        """Batch buffers that fit in the bound: one for the consumer and at least one to read ahead."""
        size = sum(RowBuffer.bytes_for(self.batch_size, shape, dtype) for shape, dtype in self._shapes)
        if 2 * size > self.config.prefetch_bytes:
            shapes = " and ".join(f"{list(shape)} ({dtype})" for shape, dtype in self._shapes)
            raise ConfigError(
                f"two batches of {self.batch_size} samples {shapes} take {2 * size} bytes, more than "
                f"data.prefetch_bytes={self.config.prefetch_bytes}; legal: {2 * size} or more, or a smaller batch"
            )
        return min((self.config.prefetch_bytes - self._arena_bytes(size)) // size, _MAX_BUFFERS)

    def _arena_bytes(self, size: int) -> int:
        """Memory for reading whole windows ahead beside batches of `size` bytes: 0 where it does not fit or pay."""
        needs = [stream.arena_bytes() for stream in self.streams]
        total = sum(need for need in needs if need is not None)
        # A batch as long as a window leaves no time to read ahead; ranks that share a lane would all read it.
        pays = self.global_batch_size <= self.config.lanes * self.config.window and self.world_size <= self.config.lanes
        self._whole_windows = None not in needs and pays and total + 2 * size <= self.config.prefetch_bytes
        return total if self._whole_windows else 0

    def metrics(self) -> dict[str, float]:
        """Totals since the start: samples, rates, seconds the consumer waited, substitutions, retries, cache."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        waited = self._waited + (self._pipeline.wait_seconds if self._pipeline is not None else 0.0)
        reading: dict[str, float] = {}
        for stream in self.streams:
            for name, value in stream.metrics().items():
                reading[name] = reading.get(name, 0.0) + value
        return {
            "samples": self._samples,
            "samples_per_second": self._samples / seconds,
            "megabytes_per_second": self._bytes / seconds / 1e6,
            "wait_seconds": waited,
            "wait_fraction": waited / seconds,
            **reading,
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
            for stream in self.streams:
                stream.end()
        self._pipeline = None

    def close(self) -> None:
        """Stop the threads, close every file; safe to call twice."""
        self._closed = True
        self._stop()
        for stream in self.streams:
            stream.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
