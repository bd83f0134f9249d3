"""Work ahead in threads: in order, within its bound, and never stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from data_tools.bounded import OrderedWork


def _work(pieces: int, size: int, pause: float = 0.0) -> object:
    def work(job: int) -> Iterator[tuple[int, int, int]]:
        for piece in range(pieces):
            time.sleep(pause)
            yield job, piece, size

    return work


def _ordered(jobs: int, work: object, threads: int = 4, max_bytes: int = 100) -> OrderedWork[int, tuple[int, int, int]]:
    return OrderedWork(
        list(range(jobs)),
        work,
        threads=threads,
        max_bytes=max_bytes,
        size_of=lambda piece: piece[2],  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("size", [0, 1, 30, 1000])
def test_pieces_come_in_order(threads: int, size: int) -> None:
    found = [(job, piece) for job, piece, _ in _ordered(10, _work(5, size), threads)]
    assert found == [(job, piece) for job in range(10) for piece in range(5)]


def test_a_slow_consumer_does_not_fill_memory() -> None:
    work = _ordered(20, _work(10, 10), threads=8, max_bytes=100)
    for count, _ in enumerate(work):
        deadline = time.monotonic() + 60
        while count < 60 and work.peak_bytes < 100 and time.monotonic() < deadline:
            time.sleep(0.002)  # until they have gone as far ahead as they may
        if count < 60:
            time.sleep(0.002)
    assert 100 <= work.peak_bytes <= 110


def test_one_piece_beyond_the_bound_is_the_most() -> None:
    work = _ordered(20, _work(4, 70), threads=8, max_bytes=100)
    assert len(list(work)) == 80
    assert work.peak_bytes <= 170


def test_later_jobs_are_ready_while_the_first_is_slow() -> None:
    others = threading.Barrier(7)

    def work(job: int) -> Iterator[tuple[int, int, int]]:
        if job:
            others.wait(100)
            last.set()
        else:
            assert last.wait(100)
        yield job, 0, 1

    last = threading.Event()
    assert len(list(_ordered(8, work, threads=8))) == 8


def test_an_error_reaches_the_consumer_and_ends_the_threads() -> None:
    def work(job: int) -> Iterator[tuple[int, int, int]]:
        yield job, 0, 1
        if job == 3:
            raise OSError("no more")

    ordered = _ordered(50, work)
    with pytest.raises(OSError, match="no more"):
        list(ordered)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode-")]


def test_leaving_early_closes_the_work() -> None:
    closed: list[int] = []

    def work(job: int) -> Iterator[tuple[int, int, int]]:
        try:
            for piece in range(1000):
                yield job, piece, 10
        finally:
            closed.append(job)

    iterator = iter(_ordered(50, work, threads=3))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode-")]
    assert sorted(closed) == list(range(len(closed)))
    assert 1 <= len(closed) <= 3


def test_no_jobs() -> None:
    assert list(_ordered(0, _work(1, 1))) == []
