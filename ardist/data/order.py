"""Which samples a step takes: fixed lanes, one integer of state, no I/O.

N samples in S shards are cut into blocks, the blocks of an epoch are permuted, and the result is divided into L lanes
of P = N // L positions. Inside a lane, windows of W positions are permuted. The epoch is one stream that takes the
lanes in turn: ``stream[c] = lane c mod L, offset c // L``. A global batch is the next G places of the stream, laid out
lane by lane, and rank r of R takes its r-th part. So every batch is a function of (counts, seed, epoch, consumed),
whatever R was and is, and a change of G continues the same stream.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ardist.data.keyed import Domain, below, derive_key, permutation
from ardist.errors import CheckpointError, ConfigError

STATE_VERSION: Final = 1
_BLOCKS_PER_LANE: Final = 4
_CACHED_WINDOWS: Final = 8
_TRIES_IN_WINDOW: Final = 32
_WHOLE_TABLE: Final = 2**16
"""Up to this many samples of a window, the permutations of all lanes are made at once, whichever are asked for."""


class Places(NamedTuple):
    """Where the samples of some slots are: position in the epoch, shard number and row in the shard, int64 [m] each."""

    positions: npt.NDArray[np.int64]
    shards: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


class _Epoch(NamedTuple):
    """What an epoch adds: the blocks in their order, where each one ends, and the rotation."""

    order: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    rotation: int


def divisors(number: int) -> list[int]:
    """All divisors in increasing order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def check_layout(num_samples: int, *, lanes: int, global_batch_size: int, world_size: int = 1) -> None:
    """Refuse a layout that cannot be served; `ConfigError` lists every problem with the arithmetic and legal values."""
    n, count, batch, ranks = num_samples, lanes, global_batch_size, world_size
    problems = []
    if min(n, count, batch, ranks) < 1:
        problems.append(f"samples={n}, lanes={count}, global_batch_size={batch} and ranks={ranks} must be at least 1")
    else:
        if batch % count:
            problems.append(
                f"{count} lanes do not divide a global batch of {batch}: {batch} = {batch // count} x {count} + "
                f"{batch % count}; legal lanes: {divisors(batch)}; legal global batches: multiples of {count}"
            )
        if batch % ranks:
            problems.append(
                f"a global batch of {batch} cannot be split over {ranks} ranks: {batch} = {batch // ranks} x {ranks} + "
                f"{batch % ranks}; legal numbers of ranks: {divisors(batch)}"
            )
        if batch > n:
            problems.append(
                f"the dataset has {n} samples, fewer than one global batch of {batch}; "
                f"legal global batches: {_short(n, count)}"
            )
    if problems:
        raise ConfigError("the data layout is not legal: " + "; ".join(problems))


def _short(num_samples: int, lanes: int) -> str:
    if lanes > num_samples:
        return f"none with {lanes} lanes (at most {num_samples} lanes can be filled)"
    return f"multiples of {lanes} up to {num_samples // lanes * lanes}"


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank outside its world with a `ConfigError`."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} ranks (0..{world_size - 1})")


def batch_start(epoch: int, consumed: int, count: int, stream_length: int) -> tuple[int, int]:
    """(epoch, consumed) where a batch of `count` begins: here, or in the next epoch where it does not fit any more."""
    return (epoch + 1, 0) if consumed + count > stream_length else (epoch, consumed)


class LaneOrder:
    """The order of one dataset for one seed, lane count and window.

    counts: samples per shard, int [S]. seed: any integer of 64 bits. lanes: L >= 1. window: W >= 1.
    Memory and opening time grow with the number of shards (or 4 L), never with the number of samples.
    """

    def __init__(self, counts: npt.ArrayLike, *, seed: int, lanes: int, window: int) -> None:
        sizes = np.asarray(counts, np.int64)
        if sizes.ndim != 1 or len(sizes) == 0 or sizes.min() < 1:
            raise ConfigError("every shard must hold at least one sample, and there must be at least one shard")
        if lanes < 1 or window < 1:
            raise ConfigError(f"lanes={lanes} and window={window} must be at least 1")
        self.num_samples, self.seed, self.lanes, self.window = int(sizes.sum()), seed, lanes, window
        if lanes > self.num_samples:
            raise ConfigError(
                f"{lanes} lanes cannot be filled by {self.num_samples} samples; legal lanes: 1..{self.num_samples}"
            )
        self.lane_length = self.num_samples // lanes
        self._block_shard, self._block_first, self._block_size = _cut_blocks(sizes, lanes, self.num_samples)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int, int], npt.NDArray[np.int64]] = OrderedDict()

    @property
    def stream_length(self) -> int:
        """L P: places of one epoch's stream."""
        return self.lanes * self.lane_length

    def steps(self, global_batch_size: int) -> int:
        """Whole global batches of one epoch."""
        return self.stream_length // global_batch_size

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            order = permutation(derive_key(Domain.BLOCKS, self.seed, epoch), len(self._block_size))
            rotation = below(derive_key(Domain.ROTATION, self.seed, epoch), self.num_samples)
            found = self._epochs[epoch] = _Epoch(order, np.cumsum(self._block_size[order]), rotation)
            # Two, because reading ahead begins the next epoch while this one is being served.
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def locate(self, epoch: int, positions: npt.NDArray[np.int64]) -> Places:
        """The samples at these positions [0, N) of an epoch, before the shuffling inside the windows."""
        order, ends, rotation = self._epoch(epoch)
        turned = (positions + rotation) % self.num_samples
        slot = np.searchsorted(ends, turned, side="right")
        block = order[slot]
        row = self._block_first[block] + turned - (ends[slot] - self._block_size[block])
        return Places(positions, self._block_shard[block], row)

    def window_places(self, epoch: int, window: int, lanes: range) -> Places:
        """The samples of window number `window` of some lanes, unshuffled; none beyond the end of the lanes."""
        inside = np.arange(window * self.window, min((window + 1) * self.window, self.lane_length), dtype=np.int64)
        starts = np.array(lanes, np.int64) * self.lane_length
        return self.locate(epoch, (starts[:, None] + inside[None, :]).reshape(-1))

    def window_turns(self, epoch: int, window: int, lanes: range) -> npt.NDArray[np.int64]:
        """For the samples of `window_places`: how many others of its lane's window the stream takes before each."""
        low, high = self._table_lanes(lanes.start, lanes.stop)
        table = self._window(epoch, window, low, high)[lanes.start - low : lanes.stop - low]
        turns = np.empty_like(table)
        np.put_along_axis(turns, table, np.arange(table.shape[1])[None, :], axis=1)
        return turns.reshape(-1)

    def take(
        self, epoch: int, consumed: int, count: int, start: int = 0, stop: int | None = None, *, batches: int = 1
    ) -> Places:
        """Slots [start, stop) of the batch of `count` places of the stream that follows the first `consumed` ones.

        The batch is laid out lane by lane, by offset inside a lane. It must lie inside the epoch. With `batches` the
        same slots of so many batches, one batch after another; then the lanes must divide `count`.
        """
        stop_at = consumed + count * batches
        if consumed < 0 or stop_at > self.stream_length:
            raise ConfigError(f"places {consumed}..{stop_at} leave the epoch, which has {self.stream_length} places")
        if count % self.lanes == 0:
            # Every lane has as many places, and those before the lane at which the batch begins come one later.
            each, first = count // self.lanes, consumed % self.lanes
            lane, turn = np.divmod(np.arange(count, dtype=np.int64)[start:stop], each)
            offset = consumed // self.lanes + (lane < first) + turn
            if batches > 1:
                later = each * np.arange(batches, dtype=np.int64)
                lane, offset = np.tile(lane, batches), (later[:, None] + offset).reshape(-1)
        elif batches > 1:
            raise ConfigError(f"{self.lanes} lanes do not divide {count} places, so their batches differ in layout")
        else:
            places = np.arange(consumed, consumed + count, dtype=np.int64)
            chosen = places[np.argsort(places % self.lanes, kind="stable")[start:stop]]
            lane, offset = chosen % self.lanes, chosen // self.lanes
        return self.locate(epoch, lane * self.lane_length + self._shuffle(epoch, lane, offset))

    def _shuffle(self, epoch: int, lane: npt.NDArray[np.int64], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The offset in its lane that stands at `offset` once every window is permuted."""
        if self.window == 1 or not len(lane):
            return offset
        low, high = self._table_lanes(int(lane.min()), int(lane.max()) + 1)
        window = offset // self.window
        result = np.empty_like(offset)
        for number in range(int(window.min()), int(window.max()) + 1):
            here = window == number
            first = number * self.window
            table = self._window(epoch, number, low, high)
            result[here] = first + table[lane[here] - low, offset[here] - first]
        return result

    def _table_lanes(self, low: int, high: int) -> tuple[int, int]:
        """The lanes whose permutations are made where those of [low, high) are asked for."""
        return (0, self.lanes) if self.lanes * self.window <= _WHOLE_TABLE else (low, high)

    def _window(self, epoch: int, number: int, low: int, high: int) -> npt.NDArray[np.int64]:
        """Permutations of window `number` in lanes [low, high): [high - low, size]."""
        wanted = (epoch, number, low, high)
        table = self._windows.get(wanted)
        if table is None:
            size = min(self.window, self.lane_length - number * self.window)
            key = derive_key(Domain.WINDOW, self.seed, epoch, np.arange(low, high), number)
            table = permutation(key, size).reshape(high - low, size)
            self._windows[wanted] = table
            while len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(wanted)
        return table

    def window_of(self, position: int) -> tuple[int, int]:
        """[first, last) positions of the window that holds `position`."""
        lane, offset = divmod(position, self.lane_length)
        first = lane * self.lane_length + offset // self.window * self.window
        return first, min(first + self.window, (lane + 1) * self.lane_length)

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """The position that is tried as the `attempt`-th substitute of `position`.

        It lies in the same window, so that the samples at hand suffice; only when 32 of those were refused is it any
        position of the epoch. Philox 4x64 with counter (attempt, position, epoch, 0) and key (seed, domain): no state,
        the same on every rank.
        """
        mask = 0xFFFF_FFFF_FFFF_FFFF
        # numpy adds one to the counter before it makes the first block; its raw words are the plain Philox function.
        source = np.random.Philox(
            counter=np.array([attempt, position, epoch, 0], np.uint64),
            key=np.array([self.seed & mask, int(Domain.SUBSTITUTE)], np.uint64),
        )
        first, last = self.window_of(position) if attempt < _TRIES_IN_WINDOW else (0, self.num_samples)
        return first + int(source.random_raw()) % (last - first)


def _cut_blocks(
    sizes: npt.NDArray[np.int64], lanes: int, total: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(shard, first row, size) of each block: the shards, or runs of them where that gives fewer than 4 L blocks."""
    number = np.arange(len(sizes), dtype=np.int64)
    if len(sizes) >= _BLOCKS_PER_LANE * lanes:
        return number, np.zeros(len(sizes), np.int64), sizes
    longest = max(1, total // (_BLOCKS_PER_LANE * lanes))
    parts = -(-sizes // longest)
    shard = np.repeat(number, parts)
    part = np.arange(len(shard), dtype=np.int64) - np.repeat(np.cumsum(parts) - parts, parts)
    first = sizes[shard] * part // parts[shard]
    last = sizes[shard] * (part + 1) // parts[shard]
    return shard, first, last - first


@dataclass
class Cursor:
    """What a run has consumed: the whole state of the data order, identical on every rank."""

    manifest: str
    seed: int
    lanes: int
    window: int
    epoch: int = 0
    consumed: int = 0

    def state_dict(self) -> dict[str, Any]:
        """About 150 bytes of JSON."""
        return {
            "version": STATE_VERSION,
            "manifest": self.manifest,
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "lanes": self.lanes,
            "window": self.window,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; `CheckpointError` when it belongs to another order."""
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"the data state has version {state.get('version')!r}; this program reads version {STATE_VERSION}"
            )
        ours = self.state_dict()
        if missing := sorted(set(ours) - set(state)):
            raise CheckpointError(f"the data state lacks {', '.join(missing)}")
        different = [
            f"{name} was {state[name]!r} and is now {ours[name]!r}"
            for name in ("manifest", "seed", "lanes", "window")
            if state[name] != ours[name]
        ]
        if different:
            raise CheckpointError(
                f"the data state belongs to another order, so it cannot be continued: {'; '.join(different)}"
            )
        epoch, consumed = state["epoch"], state["consumed"]
        if not all(type(value) is int and value >= 0 for value in (epoch, consumed)) or consumed % self.lanes:
            raise CheckpointError(
                f"the data state has epoch {epoch!r} and consumed {consumed!r}; both are whole numbers of at least 0, "
                f"and consumed is a multiple of {self.lanes} lanes"
            )
        self.epoch, self.consumed = epoch, consumed
