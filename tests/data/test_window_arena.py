"""Whole windows in memory: the same stream as without them, and bounded."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_factory import key_of, latent, make_dataset
from window_loaders import COUNTS, corrupt, loader_of, stream, whole_windows, without_arena

from ardist.config.data import DataConfig
from ardist.data.batch import RowBuffer
from ardist.data.loader import open_loader
from ardist.data.manifest import load_manifest
from ardist.data.order import LaneOrder
from ardist.data.reader import SampleReader
from ardist.data.window_arena import ArenaClosedError, MemberRows, WindowArena
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
assert loader._buffer_count * 512 * 4096 + arena <= 48 * 2**20
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
    first, second = arena.begin(0, 0, 1), arena.begin(0, 1, 1)
    held = arena.hold(0, 0, 1)
    assert held == (first, second)
    assert arena.hold(0, 2, 3) == ()
    third = arena.begin(0, 2, 1)
    memory = arena.claim(first)
    assert memory is not None
    memory.good[:3] = True
    arena.loaded(first)
    claimed: list[MemberRows | None] = []
    waiter = threading.Thread(target=lambda: claimed.append(arena.claim(third)))
    waiter.start()
    waiter.join(0.1)
    assert waiter.is_alive()  # `first` is in its memory, and a batch needs it
    arena.let_go(held)
    waiter.join(30)
    assert claimed == [memory]
    assert not memory.good.any()
    fourth = arena.begin(0, 3, 1)
    waiter = threading.Thread(target=lambda: claimed.append(arena.claim(fourth)))
    waiter.start()
    waiter.join(0.1)
    assert waiter.is_alive()  # `second` is still being read
    arena.close()
    waiter.join(30)
    assert claimed[1:] == [None]
    with pytest.raises(ArenaClosedError):
        arena.serve(arena.hold(0, 3, 3), order.take(0, 0, 8), RowBuffer(8, (2, 3, 4), "float16"), 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x7F80, 0xFF80, 0x7FC0, 0x7BFF, 0xFBFF, 0x7F7F, 0])
def test_finite_is_what_numpy_says(dtype: Any, bits: int) -> None:
    rows = MemberRows(3, (2, 5), dtype)
    rows.payloads[1][6:8] = bits.to_bytes(2, "little")
    word = np.array([bits], np.uint16)
    number = word.view(np.float16) if dtype == "float16" else (word.astype(np.uint32) << 16).view(np.float32)
    assert rows.finite(0, 3).tolist() == [True, bool(np.isfinite(number[0])), True]
