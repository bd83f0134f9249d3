"""One dataset as a stream: its order, and its samples verified, substituted and read ahead."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ardist.config.data import DataConfig
from ardist.data.batch import RowBuffer, Rows
from ardist.data.errors import ShardError
from ardist.data.health import Substitution
from ardist.data.manifest import Manifest
from ardist.data.order import LaneOrder, Places
from ardist.data.read_ahead import ReadAhead
from ardist.data.reader import BadSample, SampleReader
from ardist.data.remote_source import open_source
from ardist.data.source import missing_or_resized
from ardist.data.window_arena import Window, WindowArena, piece_bytes
from ardist.errors import DataError
from ardist.events import events

_MAX_TRIES = 96


class Taken:
    """Slots [start, stop) of so many consecutive batches of an epoch, and the windows that are kept for them.

    Where the slots' samples are is worked out when somebody asks: batches that lie in windows need it only where a
    sample is not good.
    """

    def __init__(
        self,
        locate: Callable[..., Places],
        batch: tuple[int, int, int],
        slots: range,
        batches: int = 1,
        windows: tuple[Window, ...] = (),
    ) -> None:
        self._locate, self.batch, self.slots, self.batches, self.windows = locate, batch, slots, batches, windows
        self._places: Places | None = None

    def __len__(self) -> int:
        return len(self.slots) * self.batches

    @property
    def places(self) -> Places:
        """Of all slots, one batch after another."""
        if self._places is None:
            self._places = self._locate(*self.batch, self.slots.start, self.slots.stop, batches=self.batches)
        return self._places

    def one(self, number: int) -> Taken:
        """The slots of one of the batches."""
        epoch, consumed, count = self.batch
        return Taken(self._locate, (epoch, consumed + number * count, count), self.slots, 1, self.windows)


class DatasetStream:
    """The samples of one dataset in the order of a run. Safe to share between threads.

    The start compares the sizes of all files with the manifest: `DataError` lists what is missing or of another size,
    unless ``config.missing_shards`` says to do without those shards. Where the dataset is in an object store, only
    rank 0 looks (all ranks would ask the same), except where the ranks must know what to do without.

    lanes: those from which this rank takes its samples; None where they change from batch to batch.
    """

    def __init__(
        self, config: DataConfig, path: str, manifest: Manifest, *, seed: int, rank: int, lanes: range | None
    ) -> None:
        self.config, self.path, self.manifest = config, path, manifest
        counts = np.fromiter((shard.n for shard in manifest.shards), np.int64, len(manifest.shards))
        self.order = LaneOrder(counts, seed=seed, lanes=config.lanes, window=config.window)
        self.num_classes = len(manifest.classes) if manifest.classes is not None else None
        self._source = open_source(config, path, manifest)
        self._reader = SampleReader(
            self._source, max_open=_max_open(4 * (len(lanes or range(config.lanes)) + 1)), num_classes=self.num_classes
        )
        look = rank == 0 or self._source.looks_are_free or config.missing_shards == "substitute"
        self._missing = self._check_files() if look else frozenset()
        self._lock = threading.Lock()
        self._read_ahead: ReadAhead | None = None
        self._arena: WindowArena | None = None
        self._lanes = lanes or range(0)

    def _check_files(self) -> frozenset[str]:
        problems = missing_or_resized(self._source)
        if not problems:
            return frozenset()
        listing = "\n".join(f"  {name} {problem}" for name, problem in problems.items())
        if self.config.missing_shards == "fail":
            raise DataError(
                f"{len(problems)} files of {self.path} are not as the manifest says "
                f"(data.missing_shards=substitute would do without them):\n{listing}"
            )
        gone = set()
        for number, shard in enumerate(self.manifest.shards):
            if shard.name in problems:
                self._reader.refuse(number, ShardError(shard.name, "missing", problems[shard.name]))
                gone.add(shard.name)
        events.count("loader.missing_shard", len(gone), shards=sorted(gone))
        if len(gone) == len(self.manifest.shards):
            raise DataError(f"no shard of {self.path} can be read:\n{listing}")
        return frozenset(gone)

    def take(self, epoch: int, consumed: int, count: int, start: int, stop: int, *, batches: int = 1) -> Taken:
        """What `LaneOrder.take` gives, and reading ahead for the lanes of these slots begins."""
        taken = Taken(self._places, (epoch, consumed, count), range(start, stop), batches)
        if self._read_ahead is None or not len(taken):
            return taken
        first, last = consumed // self.order.lanes, (consumed + batches * count - 1) // self.order.lanes
        if self._arena is None:
            lanes = taken.places.positions // self.order.lane_length
            self._read_ahead.advance(epoch, first, range(int(lanes.min()), int(lanes.max()) + 1))
        else:
            self._arena.batches_begin_at(epoch, first)
            self._read_ahead.advance(epoch, first, self._arena.lanes)
            # Before the next window takes the place of one that this batch still needs.
            taken.windows = self._arena.hold(epoch, first // self.order.window, last // self.order.window)
        return taken

    def _places(self, epoch: int, consumed: int, count: int, start: int, stop: int, *, batches: int) -> Places:
        with self._lock:
            return self.order.take(epoch, consumed, count, start, stop, batches=batches)

    def let_go(self, taken: Taken) -> None:
        """These places are filled and consumed, or never will be; once for what `take` gave."""
        if self._arena is not None:
            self._arena.let_go(taken.windows)

    def slices(self, taken: Taken) -> list[Rows | None]:
        """Per batch the memory in which its slots lie as they are to be served; None: `fill` it.

        The memory is good until the slots are let go of.
        """
        _, consumed, count = taken.batch
        lanes = self.order.lanes
        if self._arena is None or len(taken.windows) != 1 or count % lanes or consumed % lanes:
            return [None] * taken.batches
        return self._arena.slices(taken.windows[0], consumed // lanes, count // lanes, taken.slots, taken.batches)

    def fill(self, epoch: int, taken: Taken, buffer: RowBuffer, slot: int) -> dict[int, Substitution]:
        """Fill the rows of `buffer` from `slot` on with good samples; returns the substitutions by row."""
        places = taken.places
        if self._arena is not None and taken.windows:
            left = self._arena.copy(taken.windows, places, buffer, slot)
        else:
            left = np.arange(len(places.positions))
        bad: list[BadSample] = []
        for first, stop in unbroken(left):
            bad += self._reader.read(places.shards[first:stop], places.rows[first:stop], buffer, slot + first)
        return {
            here: self._substitute(epoch, int(places.positions[here - slot]), here, error, buffer)
            for here, error in bad
        }

    def _substitute(self, epoch: int, position: int, slot: int, error: ShardError, buffer: RowBuffer) -> Substitution:
        for attempt in range(_MAX_TRIES):
            with self._lock:
                other = self.order.substitute(epoch, position, attempt)
                place = self.order.locate(epoch, np.array([other]))
            if other == position or self._reader.read(place.shards, place.rows, buffer, slot):
                continue
            return Substitution(
                epoch=epoch,
                position=position,
                lane=position // self.order.lane_length,
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

    def arena_bytes(self) -> int | None:
        """Memory that reading whole windows ahead takes; None where it would gain nothing."""
        if not self._lanes or self.manifest.context_shape is not None:
            return None
        window, shape, dtype = min(self.order.window, self.order.lane_length), self.manifest.shape, self.manifest.dtype
        memories = WindowArena.bytes_for(len(self._lanes), window, shape, dtype)
        return None if memories is None else memories + self.config.fetch_threads * piece_bytes(window, shape, dtype)

    def begin(self, *, whole_windows: bool, batch: int) -> None:
        """Start reading ahead; `whole_windows`: into memory, laid out for batches of so many places of the stream."""
        shape, dtype = self.manifest.shape, self.manifest.dtype
        each = batch // self.order.lanes if batch % self.order.lanes == 0 else 1
        self._arena = WindowArena(self.order, self._lanes, shape, dtype, each=each) if whole_windows else None
        self._read_ahead = ReadAhead(self.order, self._reader, self._arena, self.config.fetch_threads, self._lock)

    def stop(self) -> None:
        """Read nothing ahead any more; whoever waits for it is sent away with an `ArenaClosedError`."""
        if self._read_ahead is not None:
            self._read_ahead.stop()

    def end(self) -> None:
        """Stop reading ahead, and wait for the reads under way."""
        if self._read_ahead is not None:
            self._read_ahead.close()
        self._read_ahead = self._arena = None

    def after_fork(self) -> None:
        """Leave the parent's locks and threads behind."""
        self._lock, self._read_ahead, self._arena = threading.Lock(), None, None
        self._reader.after_fork()

    def metrics(self) -> Mapping[str, float]:
        """Counters of reading."""
        return {"read_retries": float(self._reader.retries), **self._source.metrics()}

    def close(self) -> None:
        """Stop reading ahead and close every file."""
        self.end()
        self._reader.close()


def lanes_of_rank(lanes: int, rank: int, ranks: int) -> range:
    """The lanes from which a rank takes its part of a batch that is a multiple of the lanes."""
    return range(lanes * rank // ranks, -(-lanes * (rank + 1) // ranks))


def unbroken(numbers: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """[first, stop) of every run of consecutive ones among ascending numbers."""
    if len(numbers):
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        for run in np.split(numbers, cuts):
            yield int(run[0]), int(run[-1]) + 1


def _max_open(wanted: int) -> int:
    """Shards to hold open: enough for the lanes, within half of what the system lets this process open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = 4096 if soft == resource.RLIM_INFINITY else soft // 2
    return max(8, min(max(64, wanted), limit))
