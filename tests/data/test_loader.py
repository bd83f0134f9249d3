"""The streaming loader over real files: order, resumes, resizes, memory, threads, files, forks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from dataset_factory import key_of, latent, make_dataset, number_of

import ardist
from ardist.config.data import DataConfig
from ardist.data.batch import RowBuffer
from ardist.data.loader import StreamingLoader, read_samples
from ardist.data.manifest import fold_shards, load_manifest, write_manifest
from ardist.data.measure import measure_loading
from ardist.data.order import LaneOrder, divisors
from ardist.data.sample import SampleInfo
from ardist.data.shard_writer import Sample, write_shard
from ardist.errors import CheckpointError, ConfigError, DataError

COUNTS = [50, 31, 1, 40]
FIRST = np.cumsum([0, *COUNTS])
SCHEDULES = int(os.environ.get("ARDIST_LOADER_SCHEDULES", "30"))
"""Random schedules that run through real files; the pure order runs its own ten thousand."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(folder, COUNTS)
    return folder


def open_loader(dataset: Path, *, batch: int = 8, seed: int = 1, **options: Any) -> StreamingLoader:
    settings = {"path": str(dataset), "lanes": 4, "window": 8, "prefetch_bytes": 2**20}
    config = DataConfig(**{**settings, **options.pop("config", {})})
    return StreamingLoader(config, seed=seed, global_batch_size=batch, **options)


def served(loader: StreamingLoader, steps: int) -> list[list[int]]:
    return [[number_of(value) for value in next(loader).values] for _ in range(steps)]


def test_serves_the_order_with_the_right_values_and_labels(dataset: Path) -> None:
    order = LaneOrder(COUNTS, seed=1, lanes=4, window=8)
    with open_loader(dataset) as loader:
        assert len(loader) == order.steps(8) == 15
        for epoch in range(3):
            for step in range(15):
                batch = next(loader)
                places = order.take(epoch, step * 8, 8)
                numbers = (FIRST[places.shards] + places.rows).tolist()
                assert batch.values.dtype == torch.float16
                assert batch.epoch == epoch
                assert batch.context is None
                assert torch.equal(batch.values, torch.from_numpy(np.stack([latent(number) for number in numbers])))
                assert [f"{bits & (2**64 - 1):016x}" for bits in batch.sample_ids.tolist()] == [
                    key_of(number) for number in numbers
                ]
                assert batch.class_ids is not None
                assert batch.class_ids.tolist() == [number % 5 for number in numbers]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_global_batch(dataset: Path, world_size: int) -> None:
    with open_loader(dataset) as whole:
        expected = served(whole, 20)
    loaders = [open_loader(dataset, rank=rank, world_size=world_size) for rank in range(world_size)]
    got = [[number for loader in loaders for number in served(loader, 1)[0]] for _ in range(20)]
    states = [loader.state_dict() for loader in loaders]
    for loader in loaders:
        loader.close()
    assert got == expected
    assert all(state == states[0] for state in states)


def test_random_kills_and_resizes_through_real_files(dataset: Path) -> None:
    order = LaneOrder(COUNTS, seed=1, lanes=4, window=8)
    streams = []
    for epoch in range(4):
        places = order.take(epoch, 0, order.stream_length)
        numbers = (FIRST[places.shards] + places.rows).reshape(4, -1).T.reshape(-1)
        streams.append(numbers.tolist())
    for number in range(SCHEDULES):
        rng = random.Random(number)
        state: dict[str, Any] | None = None
        got: list[list[int]] = [[], [], [], []]
        for _ in range(6):
            batch = rng.choice([4, 8, 12, 20])
            ranks = rng.choice([ranks for ranks in divisors(batch) if ranks <= 4])
            loaders = [open_loader(dataset, batch=batch, rank=rank, world_size=ranks) for rank in range(ranks)]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            for _ in range(rng.randint(1, 4)):
                for loader in loaders:
                    handed = next(loader)
                    got[handed.epoch] += [number_of(value) for value in handed.values]
            state = json.loads(json.dumps(loaders[0].state_dict()))
            for loader in loaders:
                loader.close()
        for stream, numbers in zip(streams, got, strict=True):
            assert sorted(numbers) == sorted(stream[: len(numbers)])


def test_state_is_what_was_handed_out_not_what_was_read_ahead(dataset: Path) -> None:
    with open_loader(dataset) as loader:
        assert loader.state_dict()["consumed"] == 0
        next(loader)
        assert (loader.state_dict()["epoch"], loader.state_dict()["consumed"]) == (0, 8)
        expected = served(loader, 20)
        assert (loader.state_dict()["epoch"], loader.state_dict()["consumed"]) == (1, 6 * 8)
    with open_loader(dataset) as loader:
        start = loader.state_dict()
        served(loader, 7)
        loader.load_state_dict({**start, "consumed": 8})
        assert served(loader, 20) == expected


def test_state_of_another_dataset_or_order_is_refused(dataset: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, [60, 62])
    with open_loader(dataset) as loader, open_loader(tmp_path) as other, open_loader(dataset, seed=2) as reseeded:
        state = loader.state_dict()
        with pytest.raises(CheckpointError, match="manifest was"):
            other.load_state_dict(state)
        with pytest.raises(CheckpointError, match="seed was 1 and is now 2"):
            reseeded.load_state_dict(state)


def test_buffers_are_reused_and_bounded(dataset: Path, tmp_path: Path) -> None:
    with open_loader(dataset, batch=4, config={"fetch_threads": 3}) as loader:
        addresses = {next(loader).values.data_ptr() for _ in range(200)}
        assert len(addresses) <= 32
    one_shard(tmp_path, "uint8", [np.zeros((4, 64, 64, 3), np.uint8)] * 12, kind="pixels")
    with open_loader(tmp_path, batch=8) as loader:
        assert len({next(loader).values.data_ptr() for _ in range(50)}) == 2
    with pytest.raises(ConfigError, match=r"two batches of 12 .*data\.prefetch_bytes=1048576; legal: \d+ or more"):
        open_loader(tmp_path, batch=12)


def test_memory_does_not_grow(dataset: Path) -> None:
    with open_loader(dataset, batch=40) as loader:
        served(loader, 30)
        process = psutil.Process()
        before = process.memory_info().rss
        for _ in range(1500):
            next(loader)
        assert process.memory_info().rss - before < 3 * 2**20


def test_close_leaves_no_thread_and_no_file(dataset: Path) -> None:
    process = psutil.Process()
    threads, files = set(threading.enumerate()), process.num_fds()
    loader = open_loader(dataset, config={"fetch_threads": 4})
    served(loader, 3)
    assert process.num_fds() > files
    loader.close()
    loader.close()
    # Threads and connections of earlier tests may end meanwhile.
    assert set(threading.enumerate()) <= threads
    assert process.num_fds() <= files
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_abandoned_loader_can_be_closed_before_its_first_batch(dataset: Path) -> None:
    open_loader(dataset).close()


def _child(loader: StreamingLoader, queue: Any) -> None:
    queue.put(served(loader, 10))
    loader.close()


def test_a_forked_child_continues_by_itself(dataset: Path) -> None:
    with open_loader(dataset) as loader:
        served(loader, 3)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_child, args=(loader, queue))
        # As if reading threads of the parent stood in the middle of everything at the moment of the fork.
        stream = loader.streams[0]
        table = stream._reader._table
        with stream._lock, table._shards._lock, table._parts._lock:
            child.start()
        theirs = queue.get()
        child.join(100)
        assert child.exitcode == 0
        assert theirs == served(loader, 10)


def test_missing_manifest_and_bad_layout_come_before_any_thread(dataset: Path) -> None:
    threads = set(threading.enumerate())
    for options, message in [
        ({"batch": 9}, "legal lanes"),
        ({"world_size": 3}, "legal numbers of ranks"),
        ({"batch": 400}, "122 samples"),
        ({"rank": 1}, "rank 1 is not one of 1 ranks"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_loader(dataset, **options)
    assert set(threading.enumerate()) <= threads


def test_metrics_count(dataset: Path) -> None:
    with open_loader(dataset) as loader:
        served(loader, 5)
        metrics = loader.metrics()
        assert metrics["samples"] == 40
        assert metrics["samples_per_second"] > 0
        assert metrics["substitutions"] == metrics["read_retries"] == 0
        assert 0 <= metrics["wait_fraction"] <= 1


def test_read_samples_in_manifest_order(dataset: Path) -> None:
    batch = read_samples(dataset)
    assert [number_of(value) for value in batch.values] == list(range(122))
    some = read_samples(dataset, [81, 3, 3])
    assert [number_of(value) for value in some.values] == [81, 3, 3]
    assert torch.equal(some.sample_ids, batch.sample_ids[[81, 3, 3]])
    assert some.class_ids is not None
    assert some.class_ids.tolist() == [1, 3, 3]
    for wrong in ([], [122], [-1]):
        with pytest.raises(ConfigError, match=r"0\.\.121"):
            read_samples(dataset, wrong)


def one_shard(folder: Path, dtype: Any, arrays: list[np.ndarray], **header: Any) -> None:
    samples = [
        Sample(key_of(number), array, SampleInfo(source="x", frames=len(array))) for number, array in enumerate(arrays)
    ]
    entry = write_shard(folder, 0, samples, dtype, with_sums=dtype != "uint8")
    fields = {"dataset_id": "one", "created": "", "code_version": "", **header}
    write_manifest(folder, fold_shards([entry], **fields))


def test_pixels_and_bfloat16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (2, 8, 8, 3), np.uint8) for _ in range(6)]
    one_shard(tmp_path / "pixels", "uint8", pixels, kind="pixels")
    values = read_samples(tmp_path / "pixels").values
    assert values.dtype == torch.uint8
    assert np.array_equal(values.numpy(), np.stack(pixels))

    floats = torch.randn(6, 2, 3, 4).to(torch.bfloat16)
    bits = [value.view(torch.uint16).numpy() for value in floats]
    vae = {"weights_digest": "a" * 64, "config_digest": "b" * 64}
    one_shard(tmp_path / "latents", "bfloat16", bits, kind="latents", vae=vae)
    batch = read_samples(tmp_path / "latents")
    assert batch.class_ids is None
    assert torch.equal(batch.values, floats)
    statistics = load_manifest(tmp_path / "latents").latent_statistics
    assert statistics is not None
    assert np.allclose(statistics.mean, floats.double().mean((0, 1, 2)).numpy())


def test_unlabelled_samples_of_a_labelled_dataset(tmp_path: Path) -> None:
    one_shard(tmp_path, "uint8", [np.zeros((1, 2, 2, 3), np.uint8)] * 1, kind="pixels", classes=("a", "b"))
    class_ids = read_samples(tmp_path).class_ids
    assert class_ids is not None
    assert class_ids.tolist() == [-1]


def test_one_sample_is_enough_for_a_batch_of_one(tmp_path: Path) -> None:
    make_dataset(tmp_path, [1])
    with open_loader(tmp_path, batch=1, config={"lanes": 1}) as loader:
        assert served(loader, 3) == [[0]] * 3
        assert loader.state_dict()["epoch"] == 2


_SERVE = """
import sys
from ardist.config.data import DataConfig
from ardist.data.loader import StreamingLoader
config = DataConfig(path=sys.argv[1], lanes=4, window=8, prefetch_bytes=2**20)
with StreamingLoader(config, seed=1, global_batch_size=8) as loader:
    for _ in range(5):
        print(bytes(next(loader).values.numpy().tobytes()).hex())
"""


def test_order_does_not_depend_on_the_environment(dataset: Path) -> None:
    """What the interpreter reads when it starts: hash seed, language, time zone; and where it was started."""
    with open_loader(dataset) as loader:
        expected = [bytes(next(loader).values.numpy().tobytes()).hex() for _ in range(5)]
    for seed, language, zone, folder in (("0", "C", "UTC", Path.cwd()), ("7", "C.UTF-8", "Asia/Tokyo", dataset.parent)):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": language, "TZ": zone}
        environment["PYTHONPATH"] = str(Path(ardist.__file__).parents[1])
        words = [sys.executable, "-c", _SERVE, os.path.relpath(dataset, folder)]
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == expected


@pytest.mark.parametrize("shape", [(2, 3, 4), (16, 1024, 32), (1, 1, 70_001), (7, 11, 1021)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_place_of_a_row_is_checked_for_nonfinite_numbers(shape: tuple[int, ...], dtype: Any) -> None:
    buffer = RowBuffer(5, shape, dtype)
    rng = np.random.default_rng(0)
    assert buffer.nonfinite_rows(0, 5) == []
    for value in (float("nan"), float("inf"), float("-inf")):
        for row in (0, 3, 4):
            flat = buffer.values[row].reshape(-1)
            for place in {0, flat.numel() - 1, int(rng.integers(flat.numel()))}:
                flat[place] = value
                assert buffer.nonfinite_rows(0, 5) == [row]
                assert buffer.nonfinite_rows(row, row + 1) == [row]
                assert row not in buffer.nonfinite_rows(1, 3)
                flat[place] = torch.finfo(flat.dtype).max
    assert buffer.nonfinite_rows(0, 5) == []


def normal(edit: Any) -> Any:
    return lambda number, shape: edit(np.random.default_rng(number).normal(size=shape)).astype(np.float16)


def test_latents_that_are_not_the_manifests_stop_the_run(tmp_path: Path) -> None:
    for name, edit in [("scaled", lambda v: v * 8), ("shifted", lambda v: v + 12), ("quiet", lambda v: v / 9)]:
        folder = tmp_path / name
        # As if the numbers had been changed after the statistics were taken.
        good = make_dataset(folder, [40], make=normal(lambda v: v))
        bad = make_dataset(folder, [40], make=normal(edit))
        write_manifest(folder, bad.model_copy(update={"latent_statistics": good.latent_statistics}))
        with open_loader(folder) as loader, pytest.raises(DataError, match="not those of its manifest"):
            next(loader)
        write_manifest(folder, bad)
        with open_loader(folder) as loader:
            next(loader)


def test_measure_loading(dataset: Path) -> None:
    config = DataConfig(path=str(dataset), lanes=4, window=8, prefetch_bytes=2**20)
    result = measure_loading(config, batch_size=8, seconds=0.2)
    assert result["samples"] == 8 * result["batches"] > 0
    assert result["first_batch_seconds"] > 0
    assert result["substituted"] == []
