"""Repeating what a store refused for a moment: full jitter, bounded tries and time, every repeat counted."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ardist.events import events

T = TypeVar("T")


class TransientError(Exception):
    """An attempt failed in a way that another attempt may mend; `retry_after` is the store's own wish in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class ExhaustedError(Exception):
    """All attempts failed; the message tells how often, how long, and the last reason."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently; the clock, sleep and dice are replaceable for tests."""

    tries: int = 8
    total_seconds: float = 300.0
    first_delay: float = 0.2
    longest_delay: float = 30.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    dice: Callable[[], float] = field(default=random.random)

    def run(self, operation: str, name: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it does not raise `TransientError`; `ExhaustedError` when patience ends."""
        begun = self.clock()
        for number in range(1, self.tries + 1):
            try:
                return attempt()
            except TransientError as error:
                waited = self.clock() - begun
                delay = self.dice() * min(self.longest_delay, self.first_delay * 2**number)
                if error.retry_after is not None:
                    # The store knows better, but jitter still spreads a crowd that was told the same number.
                    delay = error.retry_after * (1 + 0.25 * self.dice())
                if number == self.tries or waited + delay > self.total_seconds:
                    raise ExhaustedError(f"gave up after {number} tries in {waited:.1f} s: {error.reason}") from error
                events.count(
                    "storage.retry",
                    level=logging.WARNING if number > 2 else logging.INFO,
                    operation=operation,
                    name=name,
                    reason=error.reason,
                    attempt=number,
                    delay=f"{delay:.2f}",
                )
                self.sleep(delay)
        raise AssertionError("unreachable")
