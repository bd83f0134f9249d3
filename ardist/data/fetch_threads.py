"""Threads that read ahead: tasks in their order, and an end that nothing can hold up."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ardist.events import events

_log = logging.getLogger("ardist.data")

GRACE_SECONDS = 10.0
"""How long an end waits for reads under way before it leaves them behind."""


class FetchThreads:
    """Some daemon threads that begin tasks in the order in which they were submitted.

    They never keep the interpreter from ending, as those of `concurrent.futures` do, whose reads may take for ever.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` when a thread is free; never, when the end comes first."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._tasks and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                task = self._tasks.popleft()
            try:
                task()
            except Exception:  # noqa: BLE001 - named, counted, and met again by whoever needs the samples
                events.count("loader.read_ahead_failed")
                _log.exception("reading ahead failed; the samples are read again when they are needed")
            # A task holds what it was made for; while the thread waits for the next one nothing should.
            del task

    def stop(self) -> None:
        """Begin nothing any more."""
        with self._changed:
            self._stopping = True
            self._tasks.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and wait for the tasks under way; safe to call twice."""
        self.stop()
        join(self._threads)


def join(threads: Sequence[threading.Thread]) -> None:
    """Wait for threads that were told to end. One that hangs in a read is left behind after a while, and counted."""
    deadline = time.monotonic() + GRACE_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread.name for thread in threads if thread.is_alive() and thread is not threading.current_thread()]
    if left:
        events.count("loader.thread_left_behind", len(left), level=logging.WARNING, threads=left)
