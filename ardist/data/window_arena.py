"""The samples of the windows that come next, verified and dense in memory before a batch asks for them.

A window of a lane is a few unbroken runs of rows. Read run by run, a small sample costs a fraction of a system call
and of a turn of Python's lock; read one by one, these are most of what it costs.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from ardist.data.batch import RowBuffer
from ardist.data.order import LaneOrder, Places
from ardist.data.sample import NUMPY_DTYPES, SampleDtype, npy_header

LARGEST_MEMBER: Final = 64 * 1024
"""Bytes of a member from which on reading it by itself is as fast."""

_REMEMBERED: Final = 4
_OBJECTS_PER_ROW: Final = 1024
"""Bytes of the Python objects that stand for a row: views of it, and of its payload."""


class ArenaClosedError(RuntimeError):
    """The loader is being closed or set to another place; nothing is served any more."""


class MemberRows:
    """Reused memory for the npy members of a window, one row each, and what the index says of them."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: SampleDtype) -> None:
        header = npy_header(shape, dtype)
        self.expected_header = np.frombuffer(header, np.uint8)
        self.header_length = len(header)
        self.member_size = len(header) + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        self.bytes = np.zeros((rows, self.member_size), np.uint8)
        self.keys = np.zeros(rows, np.uint64)
        self.class_ids = np.zeros(rows, np.int64)
        self.good = np.zeros(rows, np.bool_)
        self.members = [memoryview(cast(Any, row)) for row in self.bytes]
        self.payloads = [member[self.header_length :] for member in self.members]

        self._payload = self.bytes[:, self.header_length :]
        self._exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}.get(dtype)

    def finite(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Which of the rows [first, last) hold no infinity and no NaN: no exponent of all ones."""
        if self._exponent is None:
            return np.ones(last - first, np.bool_)
        # Read as whole numbers, those with a full exponent are the largest: with a plus sign among the signed ones,
        # with a minus sign among the unsigned ones. Two maxima need no second array, a mask would.
        signed = self._payload[first:last].view(np.int16).max(axis=1) < self._exponent
        unsigned = self._payload[first:last].view(np.uint16).max(axis=1) < (self._exponent | 0x8000)
        return np.asarray(signed & unsigned)

    @staticmethod
    def bytes_for(rows: int, shape: tuple[int, ...], dtype: SampleDtype) -> int:
        """Memory that so many rows take."""
        member = len(npy_header(shape, dtype)) + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        return rows * (member + 17 + _OBJECTS_PER_ROW)


class Window:
    """The state of one window: runs that are still to be read, batches that still need it."""

    def __init__(self, epoch: int, number: int, memory: int, before: Window | None, runs: int) -> None:
        self.epoch, self.number, self.memory, self.before = epoch, number, memory, before
        self.unread, self.users, self.claimed = runs, 0, False


class WindowArena:
    """Two windows of a rank's lanes in memory: the one that batches are taken from, and the one that is read.

    `begin` and `hold` are called in the order of the batches, by one thread at a time; `claim`, `loaded` and `serve`
    by any thread. A window's memory is reused when all batches that hold it have been served.
    """

    def __init__(self, order: LaneOrder, lanes: range, shape: tuple[int, ...], dtype: SampleDtype) -> None:
        self._order, self.lanes = order, lanes
        self._layout = len(lanes) * min(order.window, order.lane_length), shape, dtype
        self._memories: list[MemberRows | None] = [None, None]
        self._latest: list[Window | None] = [None, None]
        self._turn = 0
        self._windows: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    @staticmethod
    def bytes_for(lanes: int, window: int, shape: tuple[int, ...], dtype: SampleDtype) -> int | None:
        """Memory of the arena, or None where samples are better read one by one."""
        one = MemberRows.bytes_for(1, shape, dtype)
        header = len(npy_header(shape, dtype))
        return 2 * lanes * window * one if one <= LARGEST_MEMBER and header % 2 == 0 else None

    def begin(self, epoch: int, number: int, runs: int) -> Window:
        """A window of which `runs` runs will be read; the window before the last one makes room for it."""
        with self._changed:
            memory, self._turn = self._turn, 1 - self._turn
            window = Window(epoch, number, memory, self._latest[memory], runs)
            self._latest[memory] = window
            self._windows[epoch, number] = window
            while len(self._windows) > _REMEMBERED:
                self._windows.popitem(last=False)
            return window

    def claim(self, window: Window) -> MemberRows | None:
        """The memory of a window, once nobody needs what was in it; None when the arena is closed."""
        with self._changed:
            before = window.before
            while before is not None and (before.users or before.unread) and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            memory = self._memories[window.memory]
            if memory is None:
                memory = self._memories[window.memory] = MemberRows(*self._layout)
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
        """Windows first..last as far as they are here: they stay until a batch was served from them."""
        with self._changed:
            found = (self._windows.get((epoch, number)) for number in range(first, last + 1))
            windows = tuple(window for window in found if window is not None)
            for window in windows:
                window.users += 1
            return windows

    def serve(self, windows: Sequence[Window], places: Places, buffer: RowBuffer, slot: int) -> npt.NDArray[np.int64]:
        """Copy what is in these windows into the rows of `buffer` from `slot` on; returns which of [0, m) is not.

        Waits for windows that are being read. Lets go of the windows, which `hold` gave. Raises `ArenaClosedError`.
        """
        served = np.zeros(len(places.positions), np.bool_)
        try:
            with self._changed:
                while any(window.unread for window in windows) and not self._closed:
                    self._changed.wait()
                if self._closed:
                    raise ArenaClosedError("this loader is closed")
            for window in windows:
                memory = self._memories[window.memory]
                # Where no run got as far as to claim the memory, it still holds the window before.
                if memory is not None and window.claimed:
                    served |= self._copy(memory, places, window, buffer, slot)
        finally:
            self.let_go(windows)
        return np.flatnonzero(~served)

    def let_go(self, windows: Sequence[Window]) -> None:
        """The windows that `hold` gave are not needed any more."""
        with self._changed:
            for window in windows:
                window.users -= 1
            self._changed.notify_all()

    def _copy(
        self, memory: MemberRows, places: Places, window: Window, buffer: RowBuffer, slot: int
    ) -> npt.NDArray[np.bool_]:
        lane, offset = np.divmod(places.positions, self._order.lane_length)
        first = window.number * self._order.window
        offset -= first
        # The last window of an epoch may be shorter than the others.
        size = min(self._order.window, self._order.lane_length - first)
        here = (offset >= 0) & (offset < size) & (lane >= self.lanes.start) & (lane < self.lanes.stop)
        rows = (lane - self.lanes.start) * size + offset
        here[here] = memory.good[rows[here]]
        chosen = np.flatnonzero(here)
        rows = rows[chosen]
        for place, row in zip((chosen + slot).tolist(), rows.tolist(), strict=True):
            buffer.payload[place][:] = memory.payloads[row]
        buffer.keys[chosen + slot] = memory.keys[rows]
        buffer.class_ids[chosen + slot] = memory.class_ids[rows]
        return here

    def close(self) -> None:
        """Wake everybody who waits; nothing is read or served from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
