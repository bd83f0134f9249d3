"""Counters of everything that is not the plain good case: skips, retries, substitutions, fallbacks, drops.

An event is counted, logged at once and later written into the run's summary; nothing else in the
project may swallow a fault. Safe to call from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

_log = logging.getLogger("ardist.events")


class EventCounter:
    """Counts named events; names are dotted, lowest floor first, such as ``loader.substitution``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, name: str, /, amount: int = 1, level: int = logging.WARNING, **details: object) -> None:
        """Add `amount` to `name` and log one line with the details."""
        with self._lock:
            self._counts[name] += amount
        _log.log(level, "%s %s", name, " ".join(f"{key}={value}" for key, value in details.items()))

    def snapshot(self) -> dict[str, int]:
        """The counts so far, sorted by name."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def clear(self) -> None:
        """Forget all counts (tests, and the start of a new run in the same process)."""
        with self._lock:
            self._counts.clear()


events = EventCounter()
"""The process-wide counter."""
