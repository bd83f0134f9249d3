"""Fetches what the next windows of a rank's lanes need, before anybody waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ardist.data.errors import ShardError
from ardist.data.order import LaneOrder, Places
from ardist.errors import ArdistError

_log = logging.getLogger("ardist.data")


class ReadAhead:
    """Calls `prepare(shard, first row, last row)` in its own threads for the window after the one that is read.

    prepare: opens, fetches and advises; what it raises is met again, and reported, by the
    read that needs the data.
    """

    def __init__(
        self,
        order: LaneOrder,
        prepare: Callable[[int, int, int], None],
        threads: int,
        lock: threading.Lock,
    ) -> None:
        self._order, self._prepare, self._lock = order, prepare, lock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ardist-fetch")
        self._at: tuple[int, int, range] | None = None

    def advance(self, epoch: int, offset: int, lanes: range) -> None:
        """Reading has come to `offset` of these lanes in `epoch`; called in order, by one thread at a time."""
        window = offset // self._order.window
        if self._at == (epoch, window, lanes):
            return
        if self._at is None:
            self._submit(epoch, window, lanes)
        self._at = epoch, window, lanes
        last = (self._order.lane_length - 1) // self._order.window
        self._submit(*((epoch, window + 1) if window < last else (epoch + 1, 0)), lanes)

    def _submit(self, epoch: int, window: int, lanes: range) -> None:
        with self._lock:
            places = self._order.window_places(epoch, window, lanes)
        for shard, first, last in runs(places):
            self._pool.submit(self._one, shard, first, last)

    def _one(self, shard: int, first: int, last: int) -> None:
        try:
            self._prepare(shard, first, last)
        except ShardError as error:
            _log.debug("read-ahead: %s", error)
        except (ArdistError, OSError) as error:
            _log.warning("read-ahead of shard %d failed, the read itself will try again: %s", shard, error)

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)


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
