"""Whole windows in memory: the same stream as without them, and bounded."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_factory import key_of, latent, make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from window_loaders import COUNTS, corrupt, loader_of, stream, whole_windows, without_arena

from ardist.config.data import DataConfig
from ardist.data.batch import RowBuffer
from ardist.data.batch_loader import BatchLoader
from ardist.data.fetch_threads import FetchThreads
from ardist.data.loader import open_loader
from ardist.data.manifest import load_manifest
from ardist.data.order import LaneOrder
from ardist.data.reader import SampleReader
from ardist.data.run_reader import pieces
from ardist.data.window_arena import ArenaClosedError, WindowArena, WindowRows, finite
from ardist.events import events


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(folder, COUNTS)
    return folder


LAYOUTS = [
    {"batch": 8},  # two offsets of a window of eight
    {"batch": 12},  # three offsets: batches that straddle windows
    {"batch": 20, "window": 5},  # exactly a window, out of step with the epoch's end
    {"batch": 28},  # seven of eight
    {"batch": 8, "window": 1},
    {"batch": 8, "window": 1000},  # the whole lane
    {"batch": 12, "lanes": 3, "window": 7, "fetch_threads": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_stream_with_and_without_whole_windows(
    dataset: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 3 * 122 // layout["batch"]  # over two ends of an epoch
    if layout.get("window") == 1:
        layout = {**layout, "lanes": 8}
    with loader_of(dataset, **layout) as loader:
        assert whole_windows(loader)
        got = stream(loader, steps)
    without_arena(monkeypatch)
    with loader_of(dataset, **layout) as loader:
        assert not whole_windows(loader)
        assert stream(loader, steps) == got
    assert {epoch for epoch, *_ in got} >= {0, 1, 2}


def test_whole_windows_are_what_serves(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good samples are never read one by one, whichever ranks there are."""
    single = []
    monkeypatch.setattr(SampleReader, "read", lambda self, shards, *_: single.append(len(shards)))
    for batch in (8, 12):  # the latter straddles windows
        for rank, ranks in [(0, 1), (0, 2), (1, 2), (2, 4), (3, 4)]:
            with loader_of(dataset, batch=batch, rank=rank, world_size=ranks) as loader:
                stream(loader, 40)
    assert single == []


def memories(loader: BatchLoader) -> list[tuple[int, int]]:
    """[first, last) addresses of the windows."""
    arena = loader.streams[0]._arena
    assert arena is not None
    held = [memory.values for memory in arena._memories if memory is not None]
    return [(values.data_ptr(), values.data_ptr() + values.nbytes) for values in held]


@pytest.mark.parametrize(("batch", "start"), [(8, 0), (8, 12), (12, 0), (20, 0)])
def test_batches_are_slices_of_windows_and_stay_as_they_are(dataset: Path, batch: int, start: int) -> None:
    """Nothing is copied but batches that straddle two windows, and nothing is overwritten while it is looked at."""
    window = 10 if batch == 20 else 8
    with loader_of(dataset, batch=batch, window=window) as loader:
        loader.load_state_dict({**loader.state_dict(), "consumed": start})
        in_place = []
        for _ in range(45):
            epoch, consumed = loader._position()
            consumed = 0 if consumed + batch > 120 else consumed
            values = next(loader).values
            assert values.is_contiguous()
            before = values.clone()
            fetching = loader.streams[0]._read_ahead
            assert fetching is not None
            idle(fetching._threads)
            assert torch.equal(values, before)
            inside = any(low <= values.data_ptr() < high for low, high in memories(loader))
            straddles = consumed // 4 // window != (consumed + batch - 1) // 4 // window
            in_place.append(inside)
            assert inside != straddles, (epoch, consumed)
        assert any(in_place)


def idle(threads: FetchThreads) -> None:
    """Give reading ahead the time to come as far as it can: all is read, or it waits for what the caller holds."""
    before = None
    while before != (before := len(threads._tasks)):
        time.sleep(0.005)


def test_members_at_uneven_distances_are_read_with_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptions of different lengths stand between the members."""
    make_dataset(tmp_path, [40, 40], describe=lambda number: "long " * (number % 5 * 200))
    with loader_of(tmp_path) as loader:
        assert whole_windows(loader)
        expected = stream(loader, 30)
    single, calls, read = [], [], os.preadv
    monkeypatch.setattr(SampleReader, "read", lambda self, shards, *_: single.append(len(shards)))
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(1) or read(*arguments))
    with loader_of(tmp_path) as loader:
        assert stream(loader, 30) == expected
    assert single == []
    assert len(calls) < 240


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([100, 120, 300_000, 900_000]), min_size=1, max_size=40),
    st.sampled_from([100, 64 * 1024]),
    st.sampled_from([66 * 1024, 2560 * 1024]),
)
def test_pieces_cover_a_run_and_have_one_distance(distances: list[int], size: int, at_once: int) -> None:
    offsets = np.cumsum(np.maximum(distances, size)).astype(np.int64)
    found = list(pieces(offsets, size, at_once))
    assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])]
    assert found[-1][1] == len(offsets)
    for low, high in found:
        assert len(set(np.diff(offsets[low:high]).tolist())) <= 1
        assert offsets[high - 1] + size - offsets[low] <= at_once


@pytest.mark.parametrize("batch", [8, 12])
def test_bad_samples_are_substituted_as_without_whole_windows(
    dataset: Path, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    bad = [0, 7, 8, 49, 50, 81, 100, 121]
    corrupt(folder, bad)

    def served() -> tuple[list[Any], list[Any]]:
        with loader_of(folder, batch=batch) as loader:
            got = stream(loader, 30)
            return got, [(item.sample, item.reason, item.substitute) for item in loader.substitutions]

    with_windows = served()
    assert {sample for sample, *_ in with_windows[1]} <= {key_of(number) for number in bad}
    assert len(with_windows[1]) > 5
    without_arena(monkeypatch)
    assert served() == with_windows


def test_a_shard_that_cannot_be_read_does_not_stop_the_others(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    entry = load_manifest(folder).shards[1]
    data = (folder / entry.name).read_bytes()

    def served() -> tuple[list[Any], int]:
        (folder / entry.name).write_bytes(data)
        loader = loader_of(folder)
        (folder / entry.name).unlink()
        with loader:
            got = stream(loader, 30)
            assert {(item.shard, item.reason) for item in loader.substitutions} == {(entry.name, "missing")}
            return got, len(loader.substitutions)

    with_windows = served()
    bad = {int(key_of(number), 16) for number in range(50, 81)}
    assert not bad & {bits & (2**64 - 1) for _, _, ids, _ in with_windows[0] for bits in ids}
    # Nor is anything served in its place that only lay where it should have been.
    without_arena(monkeypatch)
    assert served() == with_windows


def test_a_failure_of_reading_ahead_is_counted_and_costs_only_time(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader_of(dataset) as loader:
        expected = stream(loader, 20)
    for failure in (ValueError("a mistake of ours"), OSError("of the system")):

        def fail(*_: Any, failure: Exception = failure) -> None:
            raise failure

        monkeypatch.setattr(SampleReader, "read_run", fail)
        events.clear()
        with loader_of(dataset) as loader:
            assert stream(loader, 20) == expected
        assert events.snapshot()["loader.read_ahead_failed"] > 5


def test_what_the_memory_held_before_is_not_served(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window none of whose runs came so far as to claim its memory."""
    with loader_of(dataset) as loader:
        expected = stream(loader, 40)
    claim, calls = WindowArena.claim, []

    def sometimes(self: WindowArena, window: Any) -> Any:
        calls.append(window.number)
        if window.number == 2:
            raise MemoryError
        return claim(self, window)

    monkeypatch.setattr(WindowArena, "claim", sometimes)
    with loader_of(dataset) as loader:
        assert stream(loader, 40) == expected
    assert 2 in calls


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mixtures_on_any_ranks(dataset: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' parts lie anywhere in the datasets' lanes, and their ends do not fall together."""
    folders = [dataset, tmp_path / "b", tmp_path / "c"]
    for first, folder, counts in [(1000, folders[1], [60, 30]), (2000, folders[2], [44, 40])]:
        make_dataset(folder, counts, make=lambda number, shape, first=first: latent(first + number, shape))

    def served(**options: Any) -> list[list[Any]]:
        loaders = [loader_of(folders, batch=40, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
        got = [stream(loader, 25) for loader in loaders]
        for loader in loaders:
            loader.close()
        return got

    by_sample, by_step = served(window=16), served(window=16, mixture_by="step")
    with loader_of(folders, batch=40, window=16, mixture_by="step") as loader:
        assert whole_windows(loader)
    without_arena(monkeypatch)
    assert served(window=16) == by_sample
    assert served(window=16, mixture_by="step") == by_step


def test_ranks_of_a_mixture_read_ahead_only_their_lanes(tmp_path: Path) -> None:
    """Two ranks, two datasets of equal weight: each rank reads one dataset and nothing of the other."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        make_dataset(folder, [80, 80])
    mixture = [{"path": str(folder), "weight": 1} for folder in folders]
    config = DataConfig(mixture=mixture, lanes=4, window=8, prefetch_bytes=2**20)
    lanes = []
    for rank in range(2):
        with open_loader(config, seed=1, global_batch_size=32, rank=rank, world_size=2) as loader:
            lanes.append([len(loader.streams[number]._lanes) for number in range(2)])
            assert loader._whole_windows == [rank == 0, rank == 1]
            next(loader)
    assert lanes == [[4, 0], [0, 4]]


def test_states_loaded_in_the_middle_of_windows(dataset: Path) -> None:
    with loader_of(dataset) as loader:
        states, expected = [loader.state_dict()], []
        for _ in range(45):
            expected += stream(loader, 1)
            states.append(json.loads(json.dumps(loader.state_dict())))
    rng = random.Random(3)
    with loader_of(dataset) as loader:
        for _ in range(25):
            at = rng.randrange(44)
            loader.load_state_dict(states[at])
            count = rng.randint(0, min(4, 45 - at))
            assert stream(loader, count) == expected[at : at + count]


def test_memory_stays_within_the_bound(tmp_path: Path) -> None:
    """Arena and batch buffers together, Python's objects too; measured in a process of its own."""
    make_dataset(tmp_path, [2000] * 2, shape=(4, 64, 8), num_classes=None)
    program = f"""
import psutil
from ardist.config.data import DataConfig
from ardist.data.loader import open_loader
config = DataConfig(path={str(tmp_path)!r}, lanes=8, window=256, prefetch_bytes=48 * 2**20)
loader = open_loader(config, seed=1, global_batch_size=512)
assert all(loader._whole_windows)
rss = psutil.Process().memory_info().rss
for _ in range(20):
    next(loader)
used = psutil.Process().memory_info().rss - rss
arena = sum(stream.arena_bytes() for stream in loader.streams)
assert loader._blocks * loader._steps_at_once * 512 * 4096 + arena <= 48 * 2**20
print(used, arena)
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    used, arena = map(int, result.stdout.split())
    assert arena > 16 * 2**20
    assert arena / 2 < used < 52 * 2**20


def test_windows_are_only_taken_whole_where_they_fit_and_pay(dataset: Path, tmp_path: Path) -> None:
    with loader_of(dataset, batch=36) as loader:  # more than one window of eight in every lane
        assert not whole_windows(loader)
        stream(loader, 5)
    with loader_of(dataset, rank=5, world_size=8) as loader:  # ranks that share lanes would both read them
        assert not whole_windows(loader)
        stream(loader, 5)
    make_dataset(tmp_path, [40], shape=(16, 64, 8))  # 16 KiB: the window of four lanes does not fit in 1 MiB
    with loader_of(tmp_path, window=10) as loader:
        assert not whole_windows(loader)
        stream(loader, 5)
    assert WindowArena.bytes_for(4, 8, (16, 64, 64), "float16") is None  # read alone they are as fast


def test_arena_by_itself(dataset: Path) -> None:
    order = LaneOrder(COUNTS, seed=1, lanes=4, window=8)
    arena = WindowArena(order, range(4), (2, 3, 4), "float16")
    turns = [order.window_turns(0, number, range(4)) for number in range(4)]
    first, second = arena.begin(0, 0, 1, turns[0]), arena.begin(0, 1, 1, turns[1])
    held = arena.hold(0, 0, 1)
    assert held == (first, second)
    assert arena.hold(0, 2, 3) == ()
    third = arena.begin(0, 2, 1, turns[2])
    memory = arena.claim(first)
    assert memory is not None
    memory.good[:3] = True
    arena.loaded(first)
    claimed: list[WindowRows | None] = []
    waiter = threading.Thread(target=lambda: claimed.append(arena.claim(third)))
    waiter.start()
    waiter.join(0.1)
    assert waiter.is_alive()  # `first` is in its memory, and a batch needs it
    arena.let_go(held)
    waiter.join(30)
    assert claimed == [memory]
    assert not memory.good.any()
    fourth = arena.begin(0, 3, 1, turns[3])
    waiter = threading.Thread(target=lambda: claimed.append(arena.claim(fourth)))
    waiter.start()
    waiter.join(0.1)
    assert waiter.is_alive()  # `second` is still being read
    arena.close()
    waiter.join(30)
    assert claimed[1:] == [None]
    with pytest.raises(ArenaClosedError):
        arena.copy(arena.hold(0, 3, 3), order.take(0, 0, 8), RowBuffer(8, (2, 3, 4), "float16"), 0)
    with pytest.raises(ArenaClosedError):
        arena.slices(fourth, 24, 1, range(4), 8)


def test_batches_lie_in_a_row_only_where_the_window_was_laid_out_for_them(dataset: Path) -> None:
    order = LaneOrder(COUNTS, seed=1, lanes=4, window=8)
    arena = WindowArena(order, range(4), (2, 3, 4), "float16", each=3)
    arena.batches_begin_at(0, 1)  # so the window has 1 sample of an earlier batch, 3, 3, and 1 of one that goes on
    window = arena.begin(0, 0, 1, order.window_turns(0, 0, range(4)))
    memory = arena.claim(window)
    assert memory is not None
    memory.good[:] = True
    memory.keys[:] = np.arange(len(memory.keys))
    arena.loaded(window)
    found = arena.slices(window, 1, 3, range(12), 2)
    assert [rows is not None and rows.keys.tolist() for rows in found] == [list(range(4, 16)), list(range(16, 28))]
    own = arena.slices(window, 4, 3, range(3, 9), 1)[0]
    assert own is not None
    assert own.keys.tolist() == list(range(19, 25))
    assert arena.slices(window, 2, 3, range(12), 1) == [None]  # from another offset they lie apart
    assert arena.slices(window, 1, 2, range(8), 2) == [None, None]  # as do those of another size
    memory.good[20] = False
    assert [rows is None for rows in arena.slices(window, 1, 3, range(12), 2)] == [False, True]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x7F80, 0xFF80, 0x7FC0, 0x7BFF, 0xFBFF, 0x7F7F, 0])
def test_finite_is_what_numpy_says(dtype: Any, bits: int) -> None:
    rows = np.zeros((3, 10), np.int16)
    rows[1, 3] = np.array(bits, np.uint16).view(np.int16)
    word = np.array([bits], np.uint16)
    number = word.view(np.float16) if dtype == "float16" else (word.astype(np.uint32) << 16).view(np.float32)
    assert finite(rows, dtype).tolist() == [True, bool(np.isfinite(number[0])), True]
