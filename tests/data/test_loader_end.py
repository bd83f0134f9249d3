"""The end of a loader, and of a step that fails: nothing holds it up, nothing is left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from dataset_factory import make_dataset
from window_loaders import COUNTS, loader_of, stream

from ardist import fault
from ardist.data import fetch_threads
from ardist.data.batch import RowBuffer
from ardist.data.fetch_threads import FetchThreads
from ardist.data.loader import BatchLoader
from ardist.data.reader import SampleReader
from ardist.data.window_arena import WindowArena
from ardist.events import events


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(folder, COUNTS)
    return folder


def test_close_and_abandoned_windows_leave_no_thread(dataset: Path) -> None:
    threads, files = set(threading.enumerate()), psutil.Process().num_fds()
    for steps in (0, 1, 3, 16):
        loader = loader_of(dataset, fetch_threads=3)
        stream(loader, steps)
        loader.close()
        loader.close()
        # Threads and connections of earlier tests may end meanwhile.
        assert set(threading.enumerate()) <= threads
        assert psutil.Process().num_fds() <= files


class Gate:
    """A `SampleReader.read_run` that hangs until it is opened, from some call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self._read, self._left = SampleReader.read_run, after
        monkeypatch.setattr(SampleReader, "read_run", lambda *arguments: self._wait(*arguments))

    def _wait(self, *arguments: Any) -> None:
        self._left -= 1
        if self._left < 0:
            self.reached.set()
            assert self.open.wait(60)
        self._read(*arguments)


@pytest.mark.parametrize("after", [0, 5, 13])
def test_a_read_that_hangs_does_not_hold_up_the_end(dataset: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_threads, "GRACE_SECONDS", 0.3)
    before = set(threading.enumerate())
    gate = Gate(monkeypatch, after)
    loader = loader_of(dataset)
    failures: list[BaseException] = []

    def consume() -> None:
        try:
            while True:
                next(loader)
        except RuntimeError as error:
            failures.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert gate.reached.wait(60)
    time.sleep(0.05)
    events.clear()
    begun = time.monotonic()
    loader.close()
    assert time.monotonic() - begun < 50, "the read hangs for longer"
    assert events.snapshot()["loader.thread_left_behind"] >= 1
    consumer.join(100)
    assert not consumer.is_alive()
    assert "closed" in str(failures[0])
    gate.open.set()
    deadline = time.monotonic() + 100
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def _first(loader: BatchLoader) -> None:
    with contextlib.suppress(RuntimeError):
        next(loader)


def test_closing_does_not_wait_for_what_has_not_begun(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, stop, calls, closing = SampleReader.read_run, FetchThreads.stop, [], threading.Event()

    def slow(*arguments: Any) -> None:
        calls.append(closing.is_set())
        assert closing.wait(60)
        read(*arguments)

    def stop_then_go_on(self: FetchThreads) -> None:
        stop(self)
        closing.set()

    monkeypatch.setattr(SampleReader, "read_run", slow)
    monkeypatch.setattr(FetchThreads, "stop", stop_then_go_on)
    loader = loader_of(dataset, window=30, fetch_threads=1)  # many runs, of which close waits for one
    threading.Thread(target=_first, args=(loader,)).start()
    while not calls:
        time.sleep(0.01)
    loader.close()
    assert calls == [False], "nothing begins after the end has begun"


PROGRAM = """
import sys, threading, time
from ardist.config.data import DataConfig
from ardist.data.loader import open_loader
from ardist.data.reader import SampleReader
loader = open_loader(DataConfig(path=sys.argv[1], lanes=4, window=8), seed=1, global_batch_size=8)
next(loader)
if sys.argv[2] == "hang":
    from ardist.data import fetch_threads
    fetch_threads.GRACE_SECONDS = 0.5
    SampleReader.read_run = lambda *_: threading.Event().wait()
    next(loader)
    time.sleep(0.5)
"""


@pytest.mark.parametrize("how", ["idle", "hang"])
def test_a_program_that_forgets_to_close_ends(dataset: Path, how: str) -> None:
    """Even while a read hangs: reading threads do not keep the interpreter."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(dataset), how],
        env=environment,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0
    assert how == "hang" or result.stderr == b""
    assert b"terminate" not in result.stderr


@contextlib.contextmanager
def held_by_another(*locks: Any) -> Iterator[None]:
    """The locks are held by another thread, so that being entered twice by the same one does not open them."""
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            taken.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    try:
        yield
    finally:
        release.set()
        holder.join()


def _close_in_child(loader: BatchLoader, how: str, queue: Any) -> None:
    if how == "close":
        loader.close()
        queue.put([])
    elif how == "load":
        loader.load_state_dict(loader.state_dict())
        queue.put(stream(loader, 6))
    else:
        queue.put(stream(loader, 6))
        loader.close()


@pytest.mark.parametrize("how", ["close", "load", "read"])
def test_a_forked_child_owes_nothing_to_the_parents_threads(dataset: Path, how: str) -> None:
    with loader_of(dataset) as loader:
        stream(loader, 3)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_close_in_child, args=(loader, how, queue))
        inner = loader.streams[0]
        assert inner._arena is not None
        assert loader._pipeline is not None
        # As if the parent's threads stood inside every lock at the moment of the fork; in the loader's own order.
        assert inner._read_ahead is not None
        with held_by_another(
            loader._pipeline._changed, inner._lock, inner._arena._changed, inner._read_ahead._threads._changed
        ):
            child.start()
        theirs = queue.get()
        child.join(100)
        assert child.exitcode == 0
        assert theirs == ([] if how == "close" else stream(loader, 6))


@pytest.mark.parametrize(
    "place", ["ardist.data.batch_loader.fault.point", "ardist.data.window_arena.WindowArena.slices"]
)
def test_a_failed_step_lets_go_of_its_windows(dataset: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer gets the error, as often as it asks; when it tries again nothing waits for the windows of the
    failed step, and no step was passed over."""
    calls, work = [], fault.point if "fault" in place else WindowArena.slices

    def sometimes(*arguments: Any) -> Any:
        if "fault" in place and arguments != ("data.fill",):
            return work(*arguments)
        calls.append(1)
        if len(calls) in (2, 3, 4, 5, 6, 20):
            raise KeyError("a failed fill")
        return work(*arguments)

    monkeypatch.setattr(place, sometimes)
    taken, errors = [], 0
    with loader_of(dataset) as loader:
        while len(taken) < 40:
            try:
                taken += stream(loader, 1)
            except KeyError:
                errors += 1
                with pytest.raises(KeyError, match="a failed fill"):
                    next(loader)
                loader.load_state_dict(loader.state_dict())
    assert errors
    monkeypatch.undo()
    with loader_of(dataset) as loader:
        assert taken == stream(loader, 40)


def test_a_buffer_that_cannot_be_made_is_an_error_and_not_a_wait(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = RowBuffer.__post_init__, []

    def sometimes(self: RowBuffer) -> None:
        calls.append(1)
        if len(calls) in (2, 3):
            raise MemoryError("no pinned memory")
        make(self)

    monkeypatch.setattr(RowBuffer, "__post_init__", sometimes)
    with loader_of(dataset, batch=12) as whole:  # batches that straddle windows need memory of their own
        errors = 0
        for _ in range(60):
            try:
                next(whole)
            except MemoryError:
                errors += 1
                whole.load_state_dict(whole.state_dict())
        assert errors in (1, 2), "the second may be met by a thread that is stopped with the first"


def _raise(*_: Any) -> None:
    raise KeyError("a failed fill")


def test_tasks_run_in_their_order_and_errors_do_not_end_a_thread() -> None:
    done: list[int] = []
    threads = FetchThreads(1, "test")
    events.clear()
    for number in range(20):
        threads.submit(lambda number=number: done.append(number) if number % 5 else _raise())
    finished = threading.Event()
    threads.submit(finished.set)
    assert finished.wait(100)
    threads.close()
    threads.submit(lambda: done.append(-1))
    assert done == [number for number in range(20) if number % 5]
    assert events.snapshot()["loader.read_ahead_failed"] == 4
