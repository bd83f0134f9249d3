"""The same thing done to many machines at once: one that does not answer costs its time limit, not everybody's sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MAX_THREADS = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


def together(action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of `action` in the order of `items`; what one of them raises is raised when all have been done."""
    with ThreadPoolExecutor(max_workers=MAX_THREADS, thread_name_prefix="together") as pool:
        # Not map, which gives up what has not begun when one fails.
        futures = [pool.submit(action, item) for item in items]
    return [future.result() for future in futures]
