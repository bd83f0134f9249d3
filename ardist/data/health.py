"""How many bad samples a run puts up with."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ardist.data.errors import ShardError
from ardist.errors import DataError
from ardist.events import events

WINDOW: Final = 10_000
IN_A_ROW: Final = 100
_KEPT: Final = 1000


@dataclass(frozen=True)
class Substitution:
    """A bad sample and what was served in its place."""

    epoch: int
    position: int
    lane: int
    shard: str
    offset: int | None
    sample: str | None
    reason: str
    detail: str
    substitute: str
    attempts: int
    known_missing: bool = False


class SampleHealth:
    """Logs, counts and limits the substitutions of one rank.

    Raises `DataError` when more than `max_bad_fraction` of the last 10,000 samples were bad, or 100 in a row in one
    lane. Samples of shards that the start already reported as missing do not count towards the limits.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        self._limit = max_bad_fraction * WINDOW
        self._served = 0
        self._recent: deque[int] = deque()
        self._runs: dict[int, int] = {}
        self.reasons: Counter[str] = Counter()
        self.substitutions: deque[Substitution] = deque(maxlen=_KEPT)

    def served(self, lanes: Callable[[], npt.NDArray[np.int64]], count: int, bad: dict[int, Substitution]) -> None:
        """Note one batch of `count` slots and the substitutions by slot; lanes: gives the lane of every slot."""
        first = self._served
        self._served += count
        if not bad:
            self._runs.clear()
            return
        for slot in sorted(bad):
            item = bad[slot]
            self.reasons[item.reason] += 1
            self.substitutions.append(item)
            events.count("loader.substitution", level=logging.WARNING, **asdict(item))
            if not item.known_missing:
                self._recent.append(first + slot)
        while self._recent and self._recent[0] < self._served - WINDOW:
            self._recent.popleft()
        if len(self._recent) > self._limit:
            raise DataError(
                f"{len(self._recent)} of the last {min(self._served, WINDOW)} samples were bad; at most "
                f"{self._limit:g} of {WINDOW} are allowed (data.max_bad_fraction). {self.report()}"
            )
        for slot, lane in enumerate(lanes().tolist()):
            known = slot in bad and not bad[slot].known_missing
            self._runs[lane] = self._runs.get(lane, 0) + 1 if known else 0
            if self._runs[lane] >= IN_A_ROW:
                raise DataError(f"{IN_A_ROW} samples in a row were bad in lane {lane}. {self.report()}")

    def report(self) -> str:
        """The reasons by frequency and the latest bad samples."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(5))
        latest = "; ".join(
            str(ShardError(item.shard, item.reason, item.detail, item.offset, item.sample))
            for item in list(self.substitutions)[-3:]
        )
        return f"Reasons: {reasons}. Latest: {latest}"

    def metrics(self) -> dict[str, Any]:
        """Counts by reason."""
        return {
            "substitutions": sum(self.reasons.values()),
            **{f"substitutions_{reason}": count for reason, count in sorted(self.reasons.items())},
        }
