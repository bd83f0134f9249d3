"""What every loader shares: an ordered pipeline of planned steps, state of what was consumed, metrics, closing."""

from __future__ import annotations

import atexit
import functools
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ardist import fault
from ardist.config.data import DataConfig
from ardist.data.batch import Batch, BlockMemory, Layout, RowBuffer, Rows
from ardist.data.dataset_stream import DatasetStream
from ardist.data.health import SampleHealth, Substitution
from ardist.data.manifest import Manifest
from ardist.data.pipeline import OrderedPipeline
from ardist.data.sanity import LatentSanity
from ardist.data.steps import Block, Step
from ardist.data.window_arena import ArenaClosedError
from ardist.errors import ConfigError

_MOST_BLOCKS: Final = 64
"""Blocks ahead of the consumer; more of them would only be older."""

_MOST_STEPS: Final = 256
"""Steps of a block: planning and handing over cost as much for many as for one."""

_LEAST_BLOCKS: Final = 2
"""Blocks that must have room: one for the consumer and one that is filled."""

_open: weakref.WeakSet[BatchLoader] = weakref.WeakSet()


@atexit.register
def _close_what_is_open() -> None:
    """A thread that the end of the program meets inside a native library would abort the program."""
    for loader in list(_open):
        loader.close()


def _layout(manifest: Manifest) -> Layout:
    return manifest.shape, manifest.dtype, manifest.context_shape


def buffer_rows(manifests: Sequence[Manifest], batches: Sequence[int], world_size: int) -> dict[Layout, int]:
    """Rows of a rank's batch by their layout, for the global batch of every dataset.

    Datasets of one shape have one batch size, because they have the same number of tokens.
    """
    pairs = zip(manifests, batches, strict=True)
    return {_layout(manifest): batch // world_size for manifest, batch in pairs}


def buffer_bytes(rows: Mapping[Layout, int], prefetch_bytes: int) -> int:
    """Memory for one batch of any dataset; `ConfigError` where two of them are above the bound."""
    size = sum(RowBuffer.bytes_for(count, *layout) for layout, count in rows.items())
    if 2 * size > prefetch_bytes:
        shapes = " and ".join(f"{count} samples {list(shape)} ({dtype})" for (shape, dtype, _), count in rows.items())
        raise ConfigError(
            f"two batches of {shapes} take {2 * size} bytes, more than data.prefetch_bytes={prefetch_bytes}; legal: "
            f"{2 * size} or more, or a smaller batch"
        )
    return size


class BatchLoader(ABC):
    """Endless iterator of this rank's batches; a subclass says which samples make a step.

    ``state_dict()`` covers the batches handed out so far and nothing that was read ahead; it is the same on every
    rank. A step that fails is never passed over: its error is raised again until a state is loaded, be it the present
    one to try that step once more. The tensors of a batch are reused: they are valid until the next one is asked for. A
    child process made by a fork continues by itself from where the parent was.

    batch_size, global_batch_size: m and G. global_batch_sizes: that of every dataset, which only a token budget
    (data.tokens_per_batch) makes differ; then G is the one of the longest samples, and a batch has as many rows as
    its dataset's.
    """

    def __init__(
        self,
        config: DataConfig,
        streams: Sequence[DatasetStream],
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        batches: Sequence[int] | None = None,
    ) -> None:
        self.config, self.streams = config, tuple(streams)
        self.rank, self.world_size, self.global_batch_size = rank, world_size, global_batch_size
        self.batch_size = global_batch_size // world_size
        self.global_batch_sizes = tuple(batches or [global_batch_size] * len(streams))
        self._health = SampleHealth(config.max_bad_fraction)
        self._sanity = [LatentSanity(stream.manifest, stream.path) for stream in self.streams]
        # Datasets that are mixed have the same classes.
        self._labelled = self.streams[0].num_classes is not None
        self._rows = buffer_rows([stream.manifest for stream in self.streams], self.global_batch_sizes, world_size)
        self._whole_windows = [False] * len(self.streams)
        room = self._count_batches()
        self._steps_at_once = self._count_steps_at_once(room)
        self._blocks = min(room // self._steps_at_once, _MOST_BLOCKS)
        self._pipeline: OrderedPipeline[Block, BlockMemory] | None = None
        self._block: Block | None = None
        self._next_of_block = 0
        self._planned: Any = None
        self._failure: Exception | None = None
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
    def _plan_block(self, position: Any, most: int) -> Block:
        """The steps that follow `position`, at most `most` of them. Called by one thread at a time, in order."""

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
        if self._failure is not None:
            raise self._failure
        try:
            return self._serve()
        except Exception as error:
            self._failure = error
            raise

    def _serve(self) -> Batch:
        """The next batch, which is consumed when this returns."""
        self._leave_parent()
        if self._pipeline is None:
            self._start()
        step = self._next_step()
        if step.failure is not None:
            raise step.failure
        assert step.samples is not None
        batch, count = self._batch(step, step.samples), len(step.samples.keys)
        self._health.served(functools.partial(self._lanes, step), count, step.substitutions)
        for piece in step.pieces:
            sanity = self._sanity[piece.dataset]
            if sanity.batches_left:
                sanity.look(batch.values[piece.rows])
        self._consume(step.after)
        self._samples += count
        self._bytes += batch.values.nbytes + (0 if batch.context is None else batch.context.nbytes)
        return batch

    def _next_step(self) -> Step:
        if self._block is None or self._next_of_block == len(self._block.steps):
            assert self._pipeline is not None
            if self._block is not None:
                block, self._block = self._block, None
                self._let_go(block)
            self._block, _ = self._pipeline.take()
            self._next_of_block = 0
        step = self._block.steps[self._next_of_block]
        self._next_of_block += 1
        return step

    def _let_go(self, block: Block) -> None:
        """Nobody looks at the rows of a block any more."""
        if block.in_windows:
            block.in_windows = False
            for piece in block.pieces:
                self.streams[piece.dataset].let_go(piece.taken)

    def _batch(self, step: Step, samples: Rows) -> Batch:
        return Batch(
            values=samples.values,
            sample_ids=torch.from_numpy(samples.keys.view(np.int64).copy()),
            epoch=step.epoch,
            class_ids=torch.from_numpy(samples.class_ids.copy()) if self._labelled else None,
            context=samples.context,
        )

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
        """Start reading at what was consumed."""
        _open.add(self)
        self._planned = self._position()
        for stream, whole, batch in zip(self.streams, self._whole_windows, self.global_batch_sizes, strict=True):
            stream.begin(whole_windows=whole, batch=batch)
        # From windows in memory one thread copies faster than two, which would wait for Python's lock in turns.
        threads = 1 if all(self._whole_windows) else min(self.config.fetch_threads, self._blocks - 1)
        memories = [BlockMemory(self._rows, pinned=torch.cuda.is_available()) for _ in range(self._blocks)]
        self._pipeline = OrderedPipeline(self._plan, self._fill, memories, threads, "ardist-read")

    def _leave_parent(self) -> None:
        """In a process made by a fork: the parent's threads are not here, and its locks may never open."""
        if self._process != os.getpid():
            self._process, self._pipeline, self._block = os.getpid(), None, None
            for stream in self.streams:
                stream.after_fork()

    def _plan(self) -> Block:
        block = self._plan_block(self._planned, self._steps_at_once)
        self._planned = block.after
        return block

    def _fill(self, block: Block, memory: BlockMemory) -> None:
        block.in_windows = True
        try:
            self._find_in_windows(block)
            for number, step in enumerate(block.steps):
                if step.samples is None and step.failure is None:
                    self._fill_step(step, memory, number)
        finally:
            if not block.served_in_place:
                self._let_go(block)

    def _find_in_windows(self, block: Block) -> None:
        """Give the steps their samples that lie in memory as they are to be served."""
        try:
            fault.point("data.fill")
            if len(block.pieces) == 1:
                found = self.streams[block.pieces[0].dataset].slices(block.pieces[0].taken)
                for step, samples in zip(block.steps, found, strict=True):
                    step.samples = samples
                    block.served_in_place |= samples is not None
        except ArenaClosedError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again in the consumer's thread, when its turn has come
            block.steps[0].failure = error

    def _fill_step(self, step: Step, memory: BlockMemory, number: int) -> None:
        """Copy or read the rows of one step, the block's step `number`, into memory of its own."""
        try:
            buffer = memory.of(number, _layout(self.streams[step.pieces[0].dataset].manifest))
            for piece in step.pieces:
                stream = self.streams[piece.dataset]
                step.substitutions |= stream.fill(piece.epoch, piece.taken, buffer, piece.slot)
        except ArenaClosedError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again in the consumer's thread, when its turn has come
            step.failure = error
        else:
            step.samples = buffer.all_rows()

    def _count_batches(self) -> int:
        """Batches that fit in the bound: one for the consumer and at least one to read ahead."""
        size = buffer_bytes(self._rows, self.config.prefetch_bytes)
        return (self.config.prefetch_bytes - self._arena_bytes(size)) // size

    def _count_steps_at_once(self, batches: int) -> int:
        """Steps of a block: 1 in a mixture, and where there are no whole windows in memory to copy them from."""
        if len(self.streams) > 1 or not all(self._whole_windows):
            return 1
        return max(1, min(batches // _LEAST_BLOCKS, _MOST_STEPS))

    def _arena_bytes(self, size: int) -> int:
        """Memory for reading whole windows ahead beside batches of `size` bytes: 0 where it does not fit or pay."""
        needs = [stream.arena_bytes() for stream in self.streams]
        total = sum(need or 0 for need in needs)
        # A batch as long as a window leaves no time to read ahead; ranks that share a lane would all read it.
        longest = self.config.lanes * self.config.window
        pays = max(self.global_batch_sizes) <= longest and self.world_size <= self.config.lanes
        fits = pays and total + 2 * size <= self.config.prefetch_bytes
        self._whole_windows = [fits and need is not None for need in needs]
        return total if fits else 0

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
            "bytes": self._bytes,
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
        self._failure = None
        self._leave_parent()
        for stream in self.streams:
            stream.stop()
        if self._pipeline is not None:
            self._waited += self._pipeline.wait_seconds
            self._pipeline.close()
            self._pipeline = self._block = None
        for stream in self.streams:
            stream.end()

    def close(self) -> None:
        """Stop the threads, close every file; safe to call twice.

        A read that hangs is waited for some seconds, then left behind and counted (``loader.thread_left_behind``).
        """
        self._closed = True
        _open.discard(self)
        self._stop()
        for stream in self.streams:
            stream.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
