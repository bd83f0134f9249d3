"""A second request for a remote read that takes much longer than its peers did; the first answer counts.

One stalled connection would else hold up a whole step for as long as a store's timeouts are.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Final, TypeAlias

from ardist.events import events

PEERS: Final = 8
"""Reads that must have ended before one can be called late."""

LARGEST_SHARE: Final = 0.05
"""Part of all reads that may be asked for a second time."""

_LEAST_SECONDS: Final = 0.2
_REMEMBERED: Final = 64
_SECOND: Final = ".second"

Read: TypeAlias = Callable[[FileIO, Callable[[], bool]], int]
"""Fills an open file, returns the bytes received; gives up with a `LostRaceError` when the second argument says so."""


class LostRaceError(Exception):
    """The other request was faster."""


class HedgedReads:
    """Runs the reads of one source and repeats those that are late. Safe to share between threads.

    A read is late after `factor` times what its peers took in the median, in proportion where it is longer than they
    were; 0 never repeats any. At most one in twenty is repeated, so that a store that got slower is not asked twice
    for everything. `repeated`: how many were; `won`: how many of those were faster than the first request.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._peers: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self.reads = self.repeated = self.won = 0
        self.after_fork()

    def after_fork(self) -> None:
        """Forget a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()

    def run(self, name: str, read: Read, path: Path, size: int) -> int:
        """Fill `path` with `size` bytes by `read`, perhaps twice at once; returns the bytes received.

        Raises what the first request raised when no other one succeeded.
        """
        with self._lock:
            self.reads += 1
        patience = self._patience(size)
        if patience is not None:
            return self._race(name, read, path, size, patience)
        began = time.monotonic()
        with path.open("wb", buffering=0) as file:
            received = read(file, lambda: False)
        self._ended(size, time.monotonic() - began)
        return received

    def _race(self, name: str, read: Read, path: Path, size: int, patience: float) -> int:
        second = path.with_name(path.name + _SECOND)
        # Where a process was killed in the middle of a race, its file is still here.
        second.unlink(missing_ok=True)
        changed = threading.Condition()
        requests: list[_Request] = []
        try:
            requests.append(_Request(read, path, changed))
            with changed:
                if not changed.wait_for(lambda: requests[0].ended, patience) and self._may_repeat():
                    events.count("loader.read_repeated", name=name, size=size, after=f"{patience:.2f} s")
                    try:
                        requests.append(_Request(read, second, changed))
                    except (OSError, RuntimeError) as error:  # no room for a file or a thread: the first one goes on
                        events.count("loader.repeated_read_failed", name=name, reason=error)
                changed.wait_for(lambda: any(r.succeeded for r in requests) or all(r.ended for r in requests))
                winner = next((request for request in requests if request.succeeded), requests[0])
                failed = [request.error for request in requests[1:] if request.error is not None]
            for reason in failed:
                events.count("loader.repeated_read_failed", name=name, reason=reason)
            if winner.received is None:
                assert winner.error is not None
                raise winner.error
            if winner is not requests[0]:
                with self._lock:
                    self.won += 1
                # The slower request goes on writing to a file that has no name any more, until it looks up.
                os.replace(second, path)
            self._ended(size, winner.seconds)
            return winner.received
        finally:
            for request in requests:
                request.lost = True
            try:
                second.unlink(missing_ok=True)
            except OSError as error:  # in nobody's way: the next race for this object tries again
                events.count("loader.second_file_left", name=name, reason=error)

    def _patience(self, size: int) -> float | None:
        """Seconds after which a read of `size` bytes is late; None while that is not known."""
        with self._lock:
            if not self._factor or len(self._peers) < PEERS:
                return None
            usual = statistics.median(seconds * max(1.0, size / length) for length, seconds in self._peers)
        return max(_LEAST_SECONDS, self._factor * usual)

    def _may_repeat(self) -> bool:
        with self._lock:
            if self.repeated + 1 > max(1.0, LARGEST_SHARE * self.reads):
                return False
            self.repeated += 1
            return True

    def _ended(self, size: int, seconds: float) -> None:
        with self._lock:
            self._peers.append((max(1, size), seconds))


class _Request:
    """One request in a thread of its own, which nothing waits for once it lost."""

    def __init__(self, read: Read, path: Path, changed: threading.Condition) -> None:
        self._read, self._changed = read, changed
        # Opened here: who comes late must not find the file of the winner under this name.
        self._file = path.open("wb", buffering=0)
        self.received: int | None = None
        self.error: Exception | None = None
        self.seconds = 0.0
        self.ended = self.lost = False
        threading.Thread(target=self._work, name="ardist-hedge", daemon=True).start()

    @property
    def succeeded(self) -> bool:
        """Whether everything was received."""
        return self.received is not None

    def _work(self) -> None:
        began = time.monotonic()
        received, problem = None, None
        try:
            with self._file as file:
                received = self._read(file, lambda: self.lost)
        except Exception as error:  # noqa: BLE001 - whoever waits raises or counts it
            problem = error
        with self._changed:
            self.received, self.error = received, problem
            self.seconds, self.ended = time.monotonic() - began, True
            self._changed.notify_all()
