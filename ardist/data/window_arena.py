"""The samples of the windows that come next, verified and dense in memory before a batch asks for them.

A window of a lane is a few unbroken runs of rows. Read run by run, a small sample costs a fraction of a system call
and of a turn of Python's lock; read one by one, these are most of what it costs. A window lies in memory in the order
in which batches take it, so that a batch is a slice of it and is copied nowhere.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ardist.data.batch import RowBuffer, Rows
from ardist.data.order import LaneOrder, Places
from ardist.data.sample import NUMPY_DTYPES, TORCH_DTYPES, SampleDtype, npy_header, npy_size

LARGEST_MEMBER: Final = 64 * 1024
"""Bytes of a member from which on reading it by itself is as fast."""

AT_ONCE: Final = 2560 * 1024
"""Most bytes of a run that a thread reads at a time. All threads' fit in a last-level cache; smaller ones, which would
fit in the levels before it, take longer, because Python is then asked for more turns and has been swept out of these
caches by each of them."""

_BETWEEN: Final = 2048
"""Bytes from the end of one member to the next, as they usually are: tar headers and a description."""

_REMEMBERED: Final = 4

_GRAIN: Final = 32_768
"""Numbers up to which torch copies in the thread that asks; above it, it would wake a team of threads of its own."""


class ArenaClosedError(RuntimeError):
    """The loader is being closed or set to another place; nothing is served any more."""


class WindowRows:
    """Reused memory for the samples of a window, one row each, and what the index says of them.

    Whoever reads into it writes `raw` (bytes [rows, payload]), `keys`, `class_ids`, and marks in `good` what may be
    served. at_once: bytes that a thread may read at a time. pinned: in memory that a device can read by itself.
    """

    def __init__(
        self, rows: int, shape: tuple[int, ...], dtype: SampleDtype, *, at_once: int, pinned: bool = False
    ) -> None:
        self.dtype: SampleDtype = dtype
        self.at_once = at_once
        self.header = np.frombuffer(npy_header(shape, dtype), np.uint8)
        self.member_size = len(self.header) + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        size = self.member_size - len(self.header)
        # NumPy asks the system for large pages, torch does not: with small ones the first window costs twice the time.
        dense = torch.from_numpy(np.empty((rows, size), np.uint8))
        dense = dense.pin_memory() if pinned else dense
        self.values = dense.view(TORCH_DTYPES[dtype]).view(rows, *shape)
        self.raw: npt.NDArray[np.uint8] = dense.numpy()
        self._words = dense.view(torch.int64) if dense.shape[1] % 8 == 0 else dense
        self.keys = np.zeros(rows, np.uint64)
        self.class_ids = np.zeros(rows, np.int64)
        self.good = np.zeros(rows, np.bool_)

    def parts(self, first: int, count: int, width: int, own: slice) -> list[tuple[Rows, bool]]:
        """Of `count` times `width` rows from `first` on each time those of `own`, and whether they are all good."""
        rows = slice(first, first + count * width)
        values = self.values[rows].view(count, width, *self.values.shape[1:])[:, own].unbind(0)
        keys, class_ids, good = (
            column[rows].reshape(count, width)[:, own] for column in (self.keys, self.class_ids, self.good)
        )
        fine = np.asarray(good.all(axis=1)).tolist()
        pieces = zip(values, keys, class_ids, fine, strict=True)
        return [(Rows(some, their, labels, None), whole) for some, their, labels, whole in pieces]

    def copy_rows(self, rows: npt.NDArray[np.int64], target: torch.Tensor) -> None:
        """The payloads of `rows`, one after another, into `target`: dense bytes [len(rows), payload]."""
        numbers, words = torch.from_numpy(rows), target.view(self._words.dtype)
        at_once = max(1, _GRAIN // words.shape[1])
        for first in range(0, len(rows), at_once):
            few = slice(first, first + at_once)
            torch.index_select(self._words, 0, numbers[few], out=words[few])

    @staticmethod
    def bytes_for(rows: int, shape: tuple[int, ...], dtype: SampleDtype) -> int:
        """Memory that so many rows take."""
        return rows * (math.prod(shape) * NUMPY_DTYPES[dtype].itemsize + 32)


class Window:
    """The state of one window: runs that are still to be read, batches that still need it.

    rows: the row in memory for every sample of the window, as they lie in the lanes, one lane after another.
    size: samples of a lane. lead: how many of them still belong to a batch that began in the window before.
    """

    def __init__(
        self,
        number: int,
        memory: int,
        before: Window | None,
        runs: int,
        rows: npt.NDArray[np.int64],
        size: int,
        lead: int,
    ) -> None:
        self.number, self.memory, self.before = number, memory, before
        self.rows, self.size, self.lead = rows, size, lead
        self.unread, self.users, self.claimed = runs, 0, False


class WindowArena:
    """Two windows of a rank's lanes in memory: the one that batches are taken from, and the one that is read.

    each: samples that a batch takes from every lane; a window's rows lie batch by batch, lane by lane.
    `begin` and `hold` are called in the order of the batches, by one thread at a time; `claim`, `loaded`, `slices`
    and `copy` by any thread. A window's memory is reused when all that `hold` it have let go of it.
    """

    def __init__(
        self, order: LaneOrder, lanes: range, shape: tuple[int, ...], dtype: SampleDtype, *, each: int = 1
    ) -> None:
        self._order, self.lanes, self._each = order, lanes, each
        window = min(order.window, order.lane_length)
        self._layout, self._at_once = (len(lanes) * window, shape, dtype), piece_bytes(window, shape, dtype)
        self._memories: list[WindowRows | None] = [None, None]
        self._latest: list[Window | None] = [None, None]
        self._turn = 0
        self._windows: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._phase: tuple[int, int] | None = None

    @staticmethod
    def bytes_for(lanes: int, window: int, shape: tuple[int, ...], dtype: SampleDtype) -> int | None:
        """Memory of the arena, or None where samples are better read one by one."""
        one = WindowRows.bytes_for(1, shape, dtype)
        header = len(npy_header(shape, dtype))
        return 2 * lanes * window * one if one <= LARGEST_MEMBER and header % 2 == 0 else None

    def batches_begin_at(self, epoch: int, offset: int) -> None:
        """The first batch that is taken begins at this offset of the lanes; in later epochs it is 0."""
        if self._phase is None:
            self._phase = epoch, offset % self._each

    def begin(self, epoch: int, number: int, runs: int, turns: npt.NDArray[np.int64]) -> Window:
        """A window of which `runs` runs will be read; the window before the last one makes room for it.

        turns: of `LaneOrder.window_turns`.
        """
        size = len(turns) // len(self.lanes)
        phase = self._phase[1] if self._phase is not None and self._phase[0] == epoch else 0
        lead = min((phase - number * self._order.window) % self._each, size)
        rows = self._rows(size, lead, turns)
        with self._changed:
            memory, self._turn = self._turn, 1 - self._turn
            window = Window(number, memory, self._latest[memory], runs, rows, size, lead)
            self._latest[memory] = window
            self._windows[epoch, number] = window
            while len(self._windows) > _REMEMBERED:
                self._windows.popitem(last=False)
            return window

    def _rows(self, size: int, lead: int, turns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the samples of a window lie in memory: those of one batch together, lane by lane as in the batch."""
        lane = np.repeat(np.arange(len(self.lanes)), size)
        first = np.where(turns < lead, 0, lead + (turns - lead) // self._each * self._each)
        length = np.where(turns < lead, lead, np.minimum(self._each, size - first))
        return np.asarray(first * len(self.lanes) + lane * length + turns - first)

    def claim(self, window: Window) -> WindowRows | None:
        """The memory of a window, once nobody needs what was in it; None when the arena is closed."""
        with self._changed:
            before = window.before
            while before is not None and (before.users or before.unread) and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            memory = self._memories[window.memory]
            if memory is None:
                memory = WindowRows(*self._layout, at_once=self._at_once, pinned=torch.cuda.is_available())
                self._memories[window.memory] = memory
            if not window.claimed:
                memory.good.fill(False)
                window.claimed, window.before = True, None
            return memory

    def loaded(self, window: Window) -> None:
        """One run of the window was read, or cannot be."""
        with self._changed:
            window.unread -= 1
            if not window.unread:
                self._changed.notify_all()

    def hold(self, epoch: int, first: int, last: int) -> tuple[Window, ...]:
        """Windows first..last as far as they are here: they stay as they are until `let_go`."""
        with self._changed:
            found = (self._windows.get((epoch, number)) for number in range(first, last + 1))
            windows = tuple(window for window in found if window is not None)
            for window in windows:
                window.users += 1
            return windows

    def let_go(self, windows: Sequence[Window]) -> None:
        """The windows that `hold` gave are not needed any more."""
        with self._changed:
            for window in windows:
                window.users -= 1
            self._changed.notify_all()

    def slices(self, window: Window, offset: int, each: int, slots: range, batches: int) -> list[Rows | None]:
        """Per batch the memory in which its `slots` lie one after another, all of them good; else None.

        The first of the batches begins at `offset` of the lanes, and they take `each` samples of every lane; they all
        lie in the window. Waits until it is read. The rows are good until `let_go`. Raises `ArenaClosedError`.
        """
        self._wait_for([window])
        memory, first = self._memory_of(window), offset - window.number * self._order.window
        whole = each == self._each and (first - window.lead) % each == 0
        if memory is None or not whole:
            return [None] * batches
        lanes, before = len(self.lanes), self.lanes.start * each
        own = slice(slots.start - before, slots.stop - before)
        return [rows if good else None for rows, good in memory.parts(first * lanes, batches, each * lanes, own)]

    def copy(self, windows: Sequence[Window], places: Places, buffer: RowBuffer, slot: int) -> npt.NDArray[np.int64]:
        """Copy what is in these windows into the rows of `buffer` from `slot` on; returns which of [0, m) is not.

        Waits until the windows are read. Raises `ArenaClosedError`.
        """
        self._wait_for(windows)
        copied = np.zeros(len(places.positions), np.bool_)
        for window in windows:
            memory = self._memory_of(window)
            if memory is None:
                continue
            here, rows = self._find(window, places)
            here &= memory.good[rows]
            chosen, rows = np.flatnonzero(here), rows[here]
            if len(chosen) == len(here):
                memory.copy_rows(rows, buffer.raw[slot : slot + len(rows)])
            else:
                buffer.raw.numpy()[slot + chosen] = memory.raw[rows]
            buffer.keys[slot + chosen] = memory.keys[rows]
            buffer.class_ids[slot + chosen] = memory.class_ids[rows]
            copied |= here
        return np.flatnonzero(~copied)

    def _wait_for(self, windows: Sequence[Window]) -> None:
        with self._changed:
            while any(window.unread for window in windows) and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ArenaClosedError("this loader is closed")

    def _memory_of(self, window: Window) -> WindowRows | None:
        """None where no run got as far as to claim the memory: it still holds the window before."""
        return self._memories[window.memory] if window.claimed else None

    def _find(self, window: Window, places: Places) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which of the places are in the window, and their rows (0 for the others)."""
        lane, offset = np.divmod(places.positions, self._order.lane_length)
        lane, offset = lane - self.lanes.start, offset - window.number * self._order.window
        here = (offset >= 0) & (offset < window.size) & (lane >= 0) & (lane < len(self.lanes))
        return here, window.rows[np.where(here, lane * window.size + offset, 0)]

    def close(self) -> None:
        """Wake everybody who waits; nothing is read or served from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def piece_bytes(rows: int, shape: tuple[int, ...], dtype: SampleDtype) -> int:
    """Memory of a thread that reads runs of up to so many rows, with what lies between their members."""
    return min(AT_ONCE, rows * (npy_size(shape, dtype) + _BETWEEN))


def finite(values: npt.NDArray[Any], dtype: SampleDtype) -> npt.NDArray[np.bool_]:
    """Which rows of bits (int16 [n, numbers]) hold no infinity and no NaN: no exponent of all ones."""
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}.get(dtype)
    if exponent is None:
        return np.ones(len(values), np.bool_)
    # Read as whole numbers, those with a full exponent are the largest: with a plus sign among the signed ones,
    # with a minus sign among the unsigned ones. Two maxima need no second array, a mask would.
    return np.asarray((values.max(axis=1) < exponent) & (values.view(np.uint16).max(axis=1) < (exponent | 0x8000)))
