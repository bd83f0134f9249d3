"""Faults of stores and shards that no other file of this folder strikes; the numbers are those of the fault table."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from dataset_factory import latent, make_dataset, number_of, serve
from s3_servers import FaultProxy

from ardist.config.data import DataConfig
from ardist.data import pipeline, reader
from ardist.data.loader import StreamingLoader
from ardist.data.manifest import load_manifest
from ardist.data.tar_index import HEADER, TarIndex
from ardist.errors import CheckpointError, ConfigError
from ardist.events import events
from ardist.storage import open_storage

COUNTS = [40, 40, 40]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", COUNTS)
    return tmp_path / "data"


def open_loader(path: Path | str, *, whole: bool = True, **options: Any) -> StreamingLoader:
    fields = {"path": str(path), "lanes": 4, "window": 10, "max_bad_fraction": 1.0, "prefetch_bytes": 2**20}
    loader = StreamingLoader(DataConfig(**{**fields, **options}), seed=3, global_batch_size=12)
    loader._whole_windows = [whole]
    return loader


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.time, "sleep", lambda _: None)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_c13_read_errors_that_pass_cost_nothing(
    dataset: Path, whole: bool, code: int, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    expected = serve(open_loader(dataset, whole=whole))
    read, calls = os.preadv, []

    def flaky(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) % 3 == 1:
            raise OSError(code, os.strerror(code))
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    events.clear()
    loader = open_loader(dataset, whole=whole)
    assert serve(loader) == expected
    assert not loader.substitutions
    seen = events.snapshot()
    assert seen.get("loader.read_retry", 0) + seen.get("loader.read_ahead_failed", 0) > 0


@pytest.mark.parametrize("whole", [True, False])
def test_c13_a_shard_that_cannot_be_read_is_substituted_and_named(
    dataset: Path, whole: bool, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    entry = load_manifest(dataset).shards[1]
    for name in ("preadv", "pread"):
        call = getattr(os, name)

        def broken(descriptor: int, *arguments: Any, call: Any = call) -> Any:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(Path(entry.name).name):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(descriptor, *arguments)

        monkeypatch.setattr(os, name, broken)
    loader = open_loader(dataset, whole=whole)
    assert set(serve(loader)) <= {*range(40), *range(80, 120)}
    assert {(item.shard, item.reason) for item in loader.substitutions} == {(entry.name, "read")}
    assert "Input/output error" in loader.substitutions[0].detail
    assert loader.metrics()["read_retries"] > 0


def test_c8_a_store_that_is_gone_for_a_while_is_waited_for(
    dataset: Path,
    tmp_path: Path,
    bucket_url: str,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = open_storage(bucket_url)
    for path in dataset.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(dataset).as_posix(), path)
    expected = serve(open_loader(dataset))
    monkeypatch.setattr(pipeline, "_SAY_SO_AFTER", 0.05)
    loader = open_loader(bucket_url, cache_dir=str(tmp_path / "cache"))
    proxy.script += [("GET", "reset")] * 5
    events.clear()
    with caplog.at_level(logging.WARNING, "ardist.data"):
        assert serve(loader) == expected
    assert events.snapshot()["storage.retry"] >= 5
    assert "waiting for data" in caplog.text  # so that nobody takes it for a hang
    assert loader.metrics()["wait_seconds"] > 0
    assert not loader.substitutions


def test_c11_two_datasets_with_the_same_names_do_not_share_entries(
    dataset: Path, tmp_path: Path, bucket_url: str, proxy: FaultProxy
) -> None:
    make_dataset(tmp_path / "other", COUNTS, make=lambda number, shape: latent(number + 500, shape))
    served = []
    for name, folder in (("a", dataset), ("b", tmp_path / "other")):
        storage = open_storage(f"{bucket_url}/{name}")
        manifest = load_manifest(folder)
        # The same base names below two prefixes.
        plain = []
        for number, entry in enumerate(manifest.shards):
            entry = entry.model_copy(update={"name": f"shards/{number}.tar"})
            storage.put(entry.name, folder / manifest.shards[number].name)
            storage.put(entry.index_name, folder / manifest.shards[number].index_name)
            plain.append(entry)
        storage.put("manifest.json", manifest.model_copy(update={"shards": tuple(plain)}).dump())
        with open_loader(f"{bucket_url}/{name}", cache_dir=str(tmp_path / "cache")) as loader:
            served.append({number_of(value) for _ in range(10) for value in next(loader).values})
    assert served == [set(range(120)), set(range(500, 620))]


def test_d2_an_index_of_the_other_byte_order_is_rebuilt(dataset: Path) -> None:
    entry = load_manifest(dataset).shards[0]
    data = (dataset / entry.index_name).read_bytes()
    records = TarIndex.open(data).records
    swapped = records.byteswap().tobytes()
    (dataset / entry.index_name).write_bytes(data[: HEADER.itemsize] + swapped)
    events.clear()
    assert set(serve(open_loader(dataset))) == set(range(120))
    assert events.snapshot()["loader.index_rebuilt"] == 1


@pytest.mark.parametrize("counts", [[1], [2, 1], [997], [1, 300, 1, 1, 2, 500], [1] * 40, [3] * 7])
def test_d7_uneven_and_tiny_datasets_are_served_whole_or_refused_with_the_arithmetic(
    counts: list[int], tmp_path: Path
) -> None:
    make_dataset(tmp_path, counts)
    total = sum(counts)
    config = DataConfig(path=str(tmp_path), lanes=4, window=10, prefetch_bytes=2**20)
    if total < 12:
        with pytest.raises(ConfigError, match=f"the dataset has {total} samples"):
            StreamingLoader(config, seed=0, global_batch_size=12)
        return
    with StreamingLoader(config, seed=0, global_batch_size=12) as loader:
        numbers = [number_of(value) for _ in range(len(loader)) for value in next(loader).values]
    assert len(numbers) == len(set(numbers)) == total // 4 * 4 // 12 * 12


def test_d11_a_dataset_that_grows_while_it_is_read(dataset: Path) -> None:
    """Shards are never changed in place: the run goes on with its manifest, and only that; a resume is told."""
    with open_loader(dataset) as loader, open_loader(dataset) as untouched:
        state = loader.state_dict()
        expected = [next(untouched).sample_ids.tolist() for _ in range(25)]
        got = [next(loader).sample_ids.tolist() for _ in range(3)]
        make_dataset(dataset, [*COUNTS, 50])
        got += [next(loader).sample_ids.tolist() for _ in range(22)]
        assert got == expected
    with open_loader(dataset) as grown, pytest.raises(CheckpointError, match="manifest was"):
        grown.load_state_dict(state)
