"""Threads that fill reused buffers ahead of their consumer, in a fixed order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from ardist.data.fetch_threads import join

_log = logging.getLogger("ardist.data")
_SAY_SO_AFTER: Final = 30.0

Plan = TypeVar("Plan")
Buffer = TypeVar("Buffer")


class OrderedPipeline(Generic[Plan, Buffer]):
    """Hands out filled buffers in the order of their plans.

    plan: called by one thread at a time, in order; says what the next buffer must hold.
    fill: called by several threads at once with a plan and a buffer that nobody else uses.
    buffers: at least one; those at the end are used first, so that no more are used than are needed at a time.
    A buffer belongs to the consumer until it asks for the next one. An exception of `plan` or `fill` is raised to the
    consumer in its turn. Memory is bounded by the number of buffers.
    """

    def __init__(
        self,
        plan: Callable[[], Plan],
        fill: Callable[[Plan, Buffer], None],
        buffers: Sequence[Buffer],
        threads: int,
        name: str,
    ) -> None:
        self._plan, self._fill = plan, fill
        self._changed = threading.Condition()
        self._free = list(buffers)
        self._done: dict[int, tuple[Plan | None, Buffer, BaseException | None]] = {}
        self._started = self._taken = 0
        self._held: Buffer | None = None
        self._stopping = threading.Event()
        self.wait_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._free and not self._stopping.is_set():
                    self._changed.wait()
                if self._stopping.is_set():
                    return
                buffer = self._free.pop()  # the one used last is the warmest
                turn = self._started
                self._started += 1
                plan: Plan | None = None
                failure: BaseException | None = None
                try:
                    plan = self._plan()
                except Exception as error:  # noqa: BLE001 - raised again in the consumer's thread
                    failure = error
            if plan is not None:
                try:
                    self._fill(plan, buffer)
                except Exception as error:  # noqa: BLE001 - raised again in the consumer's thread
                    failure = error
            with self._changed:
                self._done[turn] = (plan, buffer, failure)
                self._changed.notify_all()

    def take(self) -> tuple[Plan, Buffer]:
        """The next plan and its filled buffer; the buffer handed out before goes back to the threads."""
        with self._changed:
            if self._held is not None:
                self._free.append(self._held)
                self._held = None
                self._changed.notify_all()
            before = time.perf_counter()
            while self._taken not in self._done:
                if self._stopping.is_set():
                    raise RuntimeError("the pipeline is closed")
                if not self._changed.wait(_SAY_SO_AFTER):
                    _log.warning("waiting for data for %.0f s", time.perf_counter() - before)
            self.wait_seconds += time.perf_counter() - before
            plan, buffer, failure = self._done.pop(self._taken)
            self._taken += 1
            self._held = buffer
        if failure is not None:
            raise failure
        assert plan is not None
        return plan, buffer

    def close(self) -> None:
        """Stop the threads and wait for the reads under way, but not for ever; safe to call twice."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        join(self._threads)
        self._done.clear()
        self._free.clear()
        self._held = None
