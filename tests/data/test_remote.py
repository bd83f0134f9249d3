"""Reading from an object store over HTTP: the same batches, through faults, damaged caches and killed processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dataset_factory import make_dataset, serve
from s3_servers import FaultProxy

from ardist.config.data import DataConfig
from ardist.data import remote_source
from ardist.data.loader import StreamingLoader, read_samples
from ardist.data.manifest import Manifest, load_manifest
from ardist.data.tar_index import TarIndex
from ardist.errors import DataError
from ardist.events import events
from ardist.storage import open_storage

COUNTS = [40, 40, 40]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    make_dataset(folder, COUNTS)
    return folder


@pytest.fixture
def remote(local: Path, bucket_url: str, proxy: FaultProxy) -> str:
    storage = open_storage(bucket_url)
    for path in local.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(local).as_posix(), path)
    proxy.seen.clear()
    events.clear()
    return bucket_url


def open_loader(url: str | Path, cache: Path, *, rank: int = 0, world_size: int = 1, **options: Any) -> StreamingLoader:
    settings = {"lanes": 4, "window": 10, "prefetch_bytes": 2**20, "cache_dir": str(cache), "max_bad_fraction": 1.0}
    config = DataConfig(path=str(url), **{**settings, **options})
    return StreamingLoader(config, seed=3, global_batch_size=12, rank=rank, world_size=world_size)


def requests(proxy: FaultProxy, method: str = "GET") -> int:
    return sum(seen[0] == method for seen in proxy.seen)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cached_files(cache: Path, suffix: str = "") -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks" and suffix in path.name]


def test_same_batches_as_from_disk_and_nothing_is_fetched_twice(
    remote: str, local: Path, cache: Path, proxy: FaultProxy
) -> None:
    expected = serve(open_loader(local, cache))
    loader = open_loader(remote, cache)
    assert serve(loader) == expected
    assert requests(proxy) == 1 + 3 + 3  # the manifest, three indexes, three shards
    assert loader.metrics()["cache_misses"] == 6
    assert loader.metrics()["bytes_fetched"] == sum(path.stat().st_size for path in (local / "shards").iterdir())
    again = open_loader(remote, cache)
    assert serve(again) == expected
    assert requests(proxy) == 8
    assert again.metrics()["cache_hits"] == 6
    assert read_samples(remote, [5, 100]).values.shape == (2, 2, 3, 4)


def test_cache_is_private(remote: str, cache: Path) -> None:
    serve(open_loader(remote, cache), 2)
    for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
        assert folder.stat().st_mode & 0o777 == 0o700


def test_long_shards_are_fetched_in_the_parts_that_are_needed(
    remote: str, local: Path, cache: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = serve(open_loader(local, cache), 5)
    monkeypatch.setattr(remote_source, "PART_BYTES", 8 * 1024)
    assert serve(open_loader(remote, cache), 5) == expected
    ranges = [seen[1] for seen in proxy.seen if seen[0] == "GET" and seen[1]]
    assert ranges
    assert all(int(text[6:].split("-")[1]) - int(text[6:].split("-")[0]) < 10 * 1024 for text in ranges)
    whole = sum(shard.bytes for shard in load_manifest(local).shards)
    quarter = open_loader(remote, cache.with_name("other"), rank=1, world_size=4)
    serve(quarter, 9)
    assert quarter.metrics()["bytes_fetched"] < 0.5 * whole


@pytest.mark.parametrize(
    ("script", "event"),
    [
        (["500", "503/0"], "storage.retry"),
        (["reset"], "storage.retry"),
        (["short", "short"], "storage.retry"),
        (["html"], "storage.retry"),
        (["noise"], "cache.entry_discarded"),
    ],
)
def test_faults_of_the_way_are_ridden_out(
    remote: str, local: Path, cache: Path, proxy: FaultProxy, script: list[str], event: str
) -> None:
    expected = serve(open_loader(local, cache))
    manifest = load_manifest(remote)
    config = DataConfig(path=remote, lanes=4, window=10, prefetch_bytes=2**20, cache_dir=str(cache), fetch_threads=1)
    loader = StreamingLoader(config, seed=3, global_batch_size=12, manifest=manifest)
    for number in range(3):  # the indexes, so that the faults below strike shards
        loader.streams[0]._reader._table.shard(number)
    proxy.script += [("GET", fault) for fault in script]
    assert serve(loader) == expected
    assert proxy.script == []
    assert events.snapshot()[event] >= 1
    assert not loader.substitutions


def test_wrong_bytes_under_a_key_are_never_served(remote: str, local: Path, cache: Path, proxy: FaultProxy) -> None:
    manifest = load_manifest(local)
    storage = open_storage(remote)
    data = (local / manifest.shards[1].name).read_bytes()
    storage.put(manifest.shards[1].name, bytes(byte ^ 1 for byte in data))
    proxy.seen.clear()
    loader = open_loader(remote, cache)
    assert set(serve(loader)) <= {*range(40), *range(80, 120)}
    assert {event.shard for event in loader.substitutions} == {manifest.shards[1].name}
    assert {event.reason for event in loader.substitutions} == {"checksum"}
    # Fetched anew once, in case it was the copy that was damaged, and not for each of its forty samples.
    assert requests(proxy) == 1 + 3 + 3 + 1


def test_one_wrong_sample_costs_only_itself(remote: str, local: Path, cache: Path) -> None:
    entry = load_manifest(local).shards[1]
    index = TarIndex.open((local / entry.index_name).read_bytes(), name=entry.name)
    data = bytearray((local / entry.name).read_bytes())
    data[int(index.records["offset"][7]) + 140] ^= 1
    open_storage(remote).put(entry.name, bytes(data))
    loader = open_loader(remote, cache)
    assert len(set(range(120)) - set(serve(loader))) == 1
    assert {(event.shard, event.reason) for event in loader.substitutions} == {(entry.name, "checksum")}


def test_an_object_replaced_between_two_parts_is_noticed(
    remote: str, local: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_source, "PART_BYTES", 8 * 1024)
    entry = load_manifest(local).shards[0]
    storage, good = open_storage(remote), (local / entry.name).read_bytes()
    loader = open_loader(remote, cache)
    loader.streams[0]._reader._table.part(0, 0)
    storage.put(entry.name, good)  # the same bytes again are no harm, whatever their version
    loader.streams[0]._reader._table.part(0, 39)
    storage.put(entry.name, bytes(byte ^ 1 for byte in good))
    numbers = serve(loader)
    assert len(numbers) == 120
    assert {event.shard for event in loader.substitutions} == {entry.name}
    assert events.snapshot()["loader.shard_fetched_again"] >= 1


def test_missing_objects_are_all_listed_at_the_start(
    remote: str, local: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(local)
    storage = open_storage(remote)
    for name in (manifest.shards[0].name, manifest.shards[2].index_name):
        storage.delete(name)
    storage.put(manifest.shards[1].name, b"<html></html>")
    for each in (1000, 1):
        monkeypatch.setattr(remote_source, "_LOOK_UP_EACH", each)
        with pytest.raises(DataError) as caught:
            open_loader(remote, cache)
        assert f"{manifest.shards[0].name} is missing" in str(caught.value)
        assert f"{manifest.shards[2].index_name} is missing" in str(caught.value)
        assert f"{manifest.shards[1].name} is 13 bytes long" in str(caught.value)
        assert str(caught.value).startswith("3 files")


def test_an_object_that_vanishes_later_is_named(remote: str, local: Path, cache: Path) -> None:
    entry = load_manifest(local).shards[1]
    loader = open_loader(remote, cache)
    open_storage(remote).delete(entry.name)
    assert set(serve(loader)) <= {*range(40), *range(80, 120)}
    assert {(event.shard, event.reason) for event in loader.substitutions} == {(entry.name, "missing")}


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "flip":
        path.write_bytes(data[:600] + bytes(80) + data[680:])
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "gone"])
def test_damaged_cache_entries_are_fetched_again(
    remote: str, local: Path, cache: Path, proxy: FaultProxy, kind: str
) -> None:
    expected = serve(open_loader(local, cache))
    serve(open_loader(remote, cache), 10)
    for path in cached_files(cache):
        damage(path, kind)
    proxy.seen.clear()
    events.clear()
    loader = open_loader(remote, cache)
    assert serve(loader) == expected
    assert not loader.substitutions
    assert requests(proxy) == 1 + 6
    if kind != "gone":
        assert events.snapshot()["cache.entry_discarded"] >= 6


def test_cache_may_be_deleted_while_it_is_used(remote: str, local: Path, cache: Path) -> None:
    expected = serve(open_loader(local, cache))
    loader = open_loader(remote, cache, cache_bytes=0)
    assert serve(loader) == expected
    assert cached_files(cache) == []


def test_cache_is_bounded_by_bytes(remote: str, local: Path, cache: Path) -> None:
    expected = serve(open_loader(local, cache), 30)
    limit = 3 * 100_000
    loader = open_loader(remote, cache, cache_bytes=limit)
    assert serve(loader, 30) == expected
    assert sum(path.stat().st_size for path in cached_files(cache)) <= limit
    assert loader.metrics()["cache_evicted"] == 0
    small = open_loader(remote, cache, cache_bytes=100_000)
    serve(small, 2)
    assert sum(path.stat().st_size for path in cached_files(cache)) <= 300_000


def _serve_and_report(url: str, cache: Path, queue: Any) -> None:
    queue.put(serve(open_loader(url, cache)))


def test_ranks_of_a_machine_share_one_download(remote: str, local: Path, cache: Path, proxy: FaultProxy) -> None:
    expected = serve(open_loader(local, cache))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_serve_and_report, args=(remote, cache, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert [queue.get() for _ in children] == [expected] * 3
    for child in children:
        child.join()
    assert requests(proxy) == 3 + 6


CHILD = """
import sys
from ardist.config.data import DataConfig
from ardist.data.loader import StreamingLoader
config = DataConfig(path=sys.argv[1], lanes=4, window=10, prefetch_bytes=2**20, cache_dir=sys.argv[2])
next(StreamingLoader(config, seed=3, global_batch_size=12))
"""


def test_a_process_killed_while_it_fills_the_cache_leaves_nothing_wrong(remote: str, local: Path, cache: Path) -> None:
    expected = serve(open_loader(local, cache))
    environment = {**os.environ, "ARDIST_FAULT": "kill@cache.before_rename#4"}
    result = subprocess.run([sys.executable, "-c", CHILD, remote, str(cache)], env=environment, timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL
    assert cached_files(cache, ".filling")
    assert serve(open_loader(remote, cache)) == expected
    assert not cached_files(cache, ".filling")


def test_manifest_is_read_from_the_store(remote: str, local: Path) -> None:
    manifest: Manifest = load_manifest(remote)
    assert manifest == load_manifest(local)
    open_storage(remote).put("manifest.json", b"<html>")
    with pytest.raises(DataError, match=r"s3://.*/manifest\.json is not JSON"):
        load_manifest(remote)
