"""Two hundred damaged datasets in an object store: detected, named with shard and offset, and never served.

What is damaged in the store is fetched anew once, in case the copy was at fault, and then refused; what is damaged on
the way or in the cache costs a second fetch and nothing else.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corruptions import (
    CONTENTS,
    COUNTS,
    RESIZED,
    check_one_bad,
    edit_member,
    flip_index,
    flip_payload,
    named,
    records,
    seal,
    serve,
)
from dataset_factory import make_dataset
from s3_servers import FaultProxy, S3Server

from ardist.config.data import DataConfig
from ardist.data import remote_source
from ardist.data.loader import StreamingLoader, read_samples
from ardist.data.manifest import load_manifest
from ardist.errors import DataError
from ardist.events import events
from ardist.storage import open_storage

PARTS = 24 * 1024
"""Bytes of a part in the tests that read shards in parts: four of the 80 KiB of a shard."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_dataset(folder, COUNTS)
    return folder


class Store:
    """A prefix that is made to hold exactly what a folder holds.

    Of every copy the cache holds nothing but what is undamaged: damaged shards and indexes come from the store.
    """

    def __init__(self, url: str, original: Path, folder: Path, cached: Path) -> None:
        self.url, self.original, self._folder, self._cached = url, original, folder, cached
        self._storage = open_storage(url)
        self._there: dict[str, bytes] = {}
        self._number = 0

    def copy(self) -> Path:
        """A copy of the sound dataset, to be damaged."""
        self._number += 1
        folder = self._folder / f"copy-{self._number}"
        shutil.copytree(self.original, folder)
        return folder

    def publish(self, folder: Path) -> None:
        """Write what is new or different and delete what is gone."""
        wanted = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for name in self._there.keys() - wanted.keys():
            self._storage.delete(name)
        for name, data in wanted.items():
            if self._there.get(name) != data:
                self._storage.put(name, data)
        self._there = wanted
        if not self.cache().exists():
            shutil.copytree(self._cached, self.cache())
        for entry in load_manifest(self.original).shards:
            for name, sha256 in ((entry.name, entry.sha256), (entry.index_name, entry.index_sha256)):
                if wanted.get(name) != (self.original / name).read_bytes():
                    for path in self.cache().rglob(f"{sha256}*"):
                        path.unlink()

    def cache(self) -> Path:
        """The cache of the present copy."""
        return self._folder / f"cache-{self._number}"

    def open(self, **options: Any) -> StreamingLoader:
        """A loader of what is published."""
        fields = {"lanes": 4, "window": 10, "max_bad_fraction": 0.01, "prefetch_bytes": 2**20}
        config = DataConfig(path=self.url, **{"cache_dir": str(self.cache()), **fields, **options})
        return StreamingLoader(config, seed=3, global_batch_size=12)

    def expect_one_bad(self, folder: Path, shard: int, row: int, reason: str) -> None:
        """Published, this copy is served without one sample, which is named."""
        self.publish(folder)
        check_one_bad(self.open(), load_manifest(folder), shard, row, reason, records(folder, shard))


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that gets filled with the sound shards; whole ones, by the first test that needs them."""
    return tmp_path_factory.mktemp("cached")


@pytest.fixture
def store(
    original: Path,
    cached: Path,
    object_store: S3Server,
    bucket_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.endpoint)
    # One listing says what six requests would.
    monkeypatch.setattr(remote_source, "_LOOK_UP_EACH", 0)
    store = Store(bucket_url, original, tmp_path, cached)
    if not any(cached.iterdir()):
        store.publish(store.copy())
        serve(store.open(cache_dir=str(cached)))
    events.clear()
    return store


@pytest.mark.parametrize(("seed", "count", "part_bytes"), [(1, 30, None), (2, 30, None), (3, 12, PARTS)])
def test_flipped_payload_bits(
    store: Store, monkeypatch: pytest.MonkeyPatch, seed: int, count: int, part_bytes: int | None
) -> None:
    if part_bytes is not None:
        monkeypatch.setattr(remote_source, "PART_BYTES", part_bytes)
    for number in range(count):
        folder = store.copy()
        shard, row = flip_payload(folder, load_manifest(folder), random.Random(100 * seed + number))
        store.expect_one_bad(folder, shard, row, "checksum")
    with pytest.raises(DataError, match=named(folder, shard, row)):
        read_samples(store.url)


@pytest.mark.parametrize(("reason", "edit"), CONTENTS)
def test_wrong_contents_with_right_checksums(store: Store, reason: str, edit: Callable[[bytes], bytes]) -> None:
    for number in range(5):
        folder = store.copy()
        shard, row = edit_member(folder, load_manifest(folder), random.Random(number), edit)
        store.expect_one_bad(folder, shard, row, reason)
    with pytest.raises(DataError, match=named(folder, shard, row)):
        read_samples(store.url)


def test_labels_and_sizes_that_cannot_be(store: Store) -> None:
    for column, row, reason in (("class_id", 7, "label"), ("size", 9, "header")):
        folder = store.copy()
        good = int(records(folder, 1)["size"][0])
        seal(folder, load_manifest(folder), 1, **{column: {row: 5 if column == "class_id" else good - 2}})
        store.expect_one_bad(folder, 1, row, reason)


@pytest.mark.parametrize("damage", RESIZED)
def test_objects_of_another_size_stop_the_start(store: Store, damage: str) -> None:
    for number in range(6):
        rng = random.Random(number)
        folder = store.copy()
        entry = load_manifest(folder).shards[rng.randrange(3)]
        RESIZED[damage](folder / entry.name, rng)
        store.publish(folder)
        with pytest.raises(DataError) as caught:
            store.open()
        assert f"{entry.name} is " in str(caught.value)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("damage", RESIZED)
def test_objects_that_change_after_the_start_are_never_served(
    store: Store, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    for number, part_bytes in enumerate((remote_source.PART_BYTES, PARTS, PARTS)):
        monkeypatch.setattr(remote_source, "PART_BYTES", part_bytes)
        rng = random.Random(number)
        shard = rng.randrange(3)
        folder = store.copy()
        name = load_manifest(folder).shards[shard].name
        store.publish(folder)
        loader = store.open(max_bad_fraction=1.0)
        RESIZED[damage](folder / name, rng)
        store.publish(folder)
        assert serve(loader) <= set(range(120)) - set(range(shard * 40, shard * 40 + 40))
        assert {event.shard for event in loader.substitutions} == {name}
        assert {event.reason for event in loader.substitutions} == {"missing" if damage == "missing" else "length"}


def test_flipped_index_bits_are_rebuilt(store: Store) -> None:
    for number in range(24):
        folder = store.copy()
        flip_index(folder, load_manifest(folder), random.Random(number))
        store.publish(folder)
        events.clear()
        assert serve(store.open()) == set(range(120))
        assert events.snapshot()["loader.index_rebuilt"] == 1


def test_another_shard_under_the_name_is_not_served(store: Store) -> None:
    folder = store.copy()
    manifest = load_manifest(folder)
    for kind, reason in (("name", "checksum"), ("index_name", "index")):
        shutil.copyfile(folder / getattr(manifest.shards[1], kind), folder / getattr(manifest.shards[0], kind))
        store.publish(folder)
        loader = store.open(max_bad_fraction=1.0)
        assert serve(loader) <= set(range(40, 120))
        assert {event.shard for event in loader.substitutions} == {manifest.shards[0].name}
        assert {event.reason for event in loader.substitutions} == {reason}
        shutil.rmtree(store.cache())


@pytest.mark.parametrize("part_bytes", [None, PARTS])
def test_bits_that_flip_on_the_way_cost_a_second_fetch(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, part_bytes: int | None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    if part_bytes is not None:
        monkeypatch.setattr(remote_source, "PART_BYTES", part_bytes)
    for number in range(6):
        rng = random.Random(number)
        folder = store.copy()
        store.publish(folder)
        shutil.rmtree(store.cache())
        loader = store.open(fetch_threads=1)
        for shard in range(3):  # the indexes, so that the fault strikes a shard
            loader.streams[0]._reader._table.shard(shard)
        row = rng.randrange(40 if part_bytes is None else 10)
        record = records(folder, 0)[row]
        place = int(record["offset"]) - (0 if part_bytes is None else int(records(folder, 0)[0]["offset"]))
        events.clear()
        proxy.script.append(("GET", f"flip/{place + rng.randrange(int(record['size']))}"))
        assert serve(loader) == set(range(120))
        assert proxy.script == []
        assert not loader.substitutions
        assert events.snapshot()["cache.entry_discarded"] == 1
