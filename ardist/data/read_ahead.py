"""Fetches what the next windows of a rank's lanes need, before anybody waits for it."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

import numpy as np

from ardist.data.errors import ShardError
from ardist.data.fetch_threads import FetchThreads
from ardist.data.order import LaneOrder, Places
from ardist.data.reader import SampleReader
from ardist.data.window_arena import Window, WindowArena
from ardist.errors import ArdistError
from ardist.events import events

_log = logging.getLogger("ardist.data")


class ReadAhead:
    """Gets the window after the one that is read, in its own threads.

    Where there is an arena the window is read into it, else its files are opened, fetched and advised. What goes
    wrong is met again, and reported, by the read that needs the data.
    """

    def __init__(
        self,
        order: LaneOrder,
        reader: SampleReader,
        arena: WindowArena | None,
        threads: int,
        lock: threading.Lock,
    ) -> None:
        self._order, self._reader, self._arena, self._lock = order, reader, arena, lock
        self._threads = FetchThreads(threads, "ardist-fetch")
        self._begun: tuple[tuple[int, int, range], ...] = ()

    def advance(self, epoch: int, offset: int, lanes: range) -> None:
        """Reading has come to `offset` of these lanes in `epoch`; called in order, by one thread at a time."""
        window = offset // self._order.window
        lanes = lanes if self._arena is None else self._arena.lanes
        if self._begun[:1] == ((epoch, window, lanes),):
            return
        end = (self._order.lane_length - 1) // self._order.window
        after = (epoch, window + 1) if window < end else (epoch + 1, 0)
        wanted = (epoch, window, lanes), (*after, lanes)
        for number in wanted:
            if number not in self._begun:
                self._submit(*number)
        self._begun = wanted

    def _submit(self, epoch: int, number: int, lanes: range) -> None:
        with self._lock:
            wanted = runs(self._order.window_places(epoch, number, lanes))
            turns = self._order.window_turns(epoch, number, lanes) if self._arena is not None else None
        if self._arena is None or turns is None:
            for shard, first, last in wanted:
                self._threads.submit(functools.partial(self._one, self._reader.prepare, shard, first, last))
            return
        window = self._arena.begin(epoch, number, len(wanted), turns)
        begun = 0
        for shard, first, last in wanted:
            load = functools.partial(self._load, window, begun)
            self._threads.submit(functools.partial(self._one, load, shard, first, last))
            begun += last - first + 1

    def _load(self, window: Window, begun: int, shard: int, first: int, last: int) -> None:
        """Read the run that begins with the window's sample number `begun`."""
        assert self._arena is not None
        try:
            memory = self._arena.claim(window)
            if memory is not None:
                self._reader.read_run(shard, first, last, memory, window.rows[begun : begun + last - first + 1])
        finally:
            self._arena.loaded(window)

    def _one(self, work: Callable[[int, int, int], None], shard: int, first: int, last: int) -> None:
        try:
            work(shard, first, last)
        except ShardError as error:
            _log.debug("read-ahead: %s", error)
        except (ArdistError, OSError) as error:
            events.count("loader.read_ahead_failed", level=logging.DEBUG, shard=shard)
            _log.warning("read-ahead of shard %d failed, the read itself will try again: %s", shard, error)

    def stop(self) -> None:
        """Drop what has not begun, and wake who waits for it."""
        self._threads.stop()
        if self._arena is not None:
            self._arena.close()

    def close(self) -> None:
        """Stop, and wait for what has begun."""
        self.stop()
        self._threads.close()


def runs(places: Places) -> list[tuple[int, int, int]]:
    """(shard, first row, last row) of every unbroken run of rows, in the order of the places."""
    if not len(places.rows):
        return []
    breaks = np.flatnonzero((np.diff(places.shards) != 0) | (np.diff(places.rows) != 1)) + 1
    firsts = np.concatenate([np.zeros(1, np.int64), breaks])
    lasts = np.concatenate([breaks, np.array([len(places.rows)])]) - 1
    return list(
        zip(places.shards[firsts].tolist(), places.rows[firsts].tolist(), places.rows[lasts].tolist(), strict=True)
    )
