"""Work done ahead by threads, delivered in order, with a bound on the bytes that wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")


class OrderedWork(Generic[J, R]):
    """Runs `work(job)` for the jobs in a few threads and yields the pieces of every job in job order.

    At most `max_bytes` of finished pieces wait, except that the job whose turn it is may always go on: so the
    bound holds up to one piece and nothing can deadlock.
    """

    def __init__(
        self,
        jobs: Sequence[J],
        work: Callable[[J], Iterator[R]],
        *,
        threads: int,
        max_bytes: int,
        size_of: Callable[[R], int],
    ) -> None:
        self._jobs, self._work, self._size_of, self._max_bytes = jobs, work, size_of, max_bytes
        self._changed = threading.Condition()
        self._pieces: list[deque[R]] = [deque() for _ in jobs]
        self._finished = [False] * len(jobs)
        self._next_job = self._head = self._waiting = self._peak = 0
        self._stopped = False
        self._error: BaseException | None = None
        count = max(1, min(threads, len(jobs)))
        self._threads = [threading.Thread(target=self._run, name=f"decode-{i}", daemon=True) for i in range(count)]

    @property
    def fill(self) -> float:
        """Waiting bytes as a fraction of the bound."""
        return self._waiting / self._max_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes that ever waited."""
        return self._peak

    def __iter__(self) -> Iterator[R]:
        for thread in self._threads:
            thread.start()
        try:
            for number in range(len(self._jobs)):
                with self._changed:
                    self._head = number
                    self._changed.notify_all()
                yield from self._pieces_of(number)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the threads; each leaves at its next piece."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _pieces_of(self, number: int) -> Iterator[R]:
        while True:
            with self._changed:
                while not (self._pieces[number] or self._finished[number] or self._error):
                    self._changed.wait()
                if self._error is not None:
                    raise self._error
                if not self._pieces[number]:
                    return
                piece = self._pieces[number].popleft()
                self._waiting -= self._size_of(piece)
                self._changed.notify_all()
            yield piece

    def _run(self) -> None:
        while True:
            with self._changed:
                number = self._next_job
                if self._stopped or number >= len(self._jobs):
                    return
                self._next_job += 1
            try:
                self._do(number)
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return

    def _do(self, number: int) -> None:
        pieces = self._work(self._jobs[number])
        try:
            for piece in pieces:
                size = self._size_of(piece)
                with self._changed:
                    while not self._stopped and self._waiting + size > self._max_bytes and number != self._head:
                        self._changed.wait()
                    # The head may overrun the bound by one piece, no more: it waits for its own to be taken.
                    while not self._stopped and number == self._head and self._overrun(size, number):
                        self._changed.wait()
                    if self._stopped:
                        return
                    self._pieces[number].append(piece)
                    self._waiting += size
                    self._peak = max(self._peak, self._waiting)
                    self._changed.notify_all()
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
            with self._changed:
                self._finished[number] = True
                self._changed.notify_all()

    def _overrun(self, size: int, number: int) -> bool:
        return self._waiting + size > self._max_bytes and bool(self._pieces[number])
