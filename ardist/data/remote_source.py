"""Shards in an object store, fetched in large pieces into the local cache."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Final

from ardist.config.data import DataConfig
from ardist.data.cache import DiskCache, default_cache_dir
from ardist.data.errors import ShardError
from ardist.data.hedge import HedgedReads, LostRaceError, Read
from ardist.data.manifest import Manifest
from ardist.data.source import IndexBytes, LocalSource, ShardSource, index_size, read_or_map
from ardist.events import events
from ardist.storage import ChangedObjectError, MissingObjectError, Storage, is_remote, open_storage

PART_BYTES: Final = 32 * 2**20
"""A shard of up to twice this is fetched whole; a longer one in parts of about this size, and only those needed."""

_LOOKUPS: Final = 16
_LOOK_UP_EACH: Final = 32
"""Objects from which on a listing, a thousand at a time, is cheaper than to ask for each."""


class RemoteSource(ShardSource):
    """Shards of an object store. What was fetched is checked sample by sample when it is read, as local files are.

    hedge_after: of a read that takes so many times longer than its peers; see `HedgedReads`.
    """

    looks_are_free = False

    def __init__(self, storage: Storage, manifest: Manifest, cache: DiskCache, hedge_after: float = 0.0) -> None:
        super().__init__(storage, manifest)
        self._cache = cache
        # Indexes are so much shorter than shards that they say nothing about each other's time.
        self._reads, self._index_reads = HedgedReads(hedge_after), HedgedReads(hedge_after)
        self._versions: dict[int, str] = {}
        self.bytes_fetched = 0
        self.after_fork()

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._cache.after_fork()
        self._reads.after_fork()
        self._index_reads.after_fork()

    def parts(self, shard: int) -> int:
        entry = self.manifest.shards[shard]
        return 1 if entry.bytes <= 2 * PART_BYTES else min(entry.n, -(-entry.bytes // PART_BYTES))

    def index(self, shard: int) -> IndexBytes:
        entry = self.manifest.shards[shard]

        def fill(path: Path) -> None:
            received = self._index_reads.run(entry.index_name, self._receive(entry.index_name), path, index_size(entry))
            self._fetched(received)
            if hashlib.sha256(path.read_bytes()).hexdigest() != entry.index_sha256:
                raise ShardError(entry.name, "index", "its index has another sha256 than the manifest says")

        data = read_or_map(self._cache.open(entry.index_sha256, index_size(entry), fill))
        if hashlib.sha256(data).hexdigest() == entry.index_sha256:
            return data
        self._cache.discard(entry.index_sha256, "damaged")
        data = self.storage.read(entry.index_name)
        self._fetched(len(data))
        return data

    def open(self, shard: int, start: int, stop: int) -> tuple[int, int]:
        entry = self.manifest.shards[shard]

        def fill(path: Path) -> None:
            for attempt in (1, 2):
                try:
                    return self._download(shard, start, stop, path)
                except ShardError as error:
                    if attempt == 2 or error.reason == "missing":
                        raise
                    events.count("loader.shard_fetched_again", shard=entry.name, reason=error.detail)

        return self._cache.open(self._name(shard, start, stop), stop - start, fill), start

    def discard(self, shard: int, start: int, stop: int, reason: str) -> bool:
        self._cache.discard(self._name(shard, start, stop), reason)
        return True

    def _name(self, shard: int, start: int, stop: int) -> str:
        return f"{self.manifest.shards[shard].sha256}-{start}-{stop}"

    def _download(self, shard: int, start: int, stop: int, path: Path) -> None:
        """A whole shard has one version by itself: it comes in one answer, or its pieces name the first one's."""
        entry = self.manifest.shards[shard]
        whole = (start, stop) == (0, entry.bytes)
        try:
            extent = (None, None, None) if whole else (start, stop - start, self._version(shard))
            received = self._reads.run(entry.name, self._receive(entry.name, *extent), path, stop - start)
        except MissingObjectError:
            raise ShardError(entry.name, "missing", "the object is missing") from None
        except ChangedObjectError as error:
            with self._lock:
                self._versions.pop(shard, None)
            raise ShardError(entry.name, "checksum", str(error), start) from None
        self._fetched(received)
        if received != stop - start:
            what = "is" if whole else f"from byte {start} on is"
            raise ShardError(entry.name, "length", f"{what} {received} bytes long, not {stop - start}")

    def _receive(
        self, name: str, start: int | None = None, length: int | None = None, version: str | None = None
    ) -> Read:
        """What asks for these bytes of an object."""

        def receive(file: FileIO, lost: Callable[[], bool]) -> int:
            def take(data: bytes) -> None:
                if lost():
                    raise LostRaceError(name)
                file.write(data)

            return self.storage.stream(name, take, start, length, version)

        return receive

    def _version(self, shard: int) -> str:
        """The version of a shard when it was first read: no later read may mix in another."""
        with self._lock:
            known = self._versions.get(shard)
        if known is None:
            entry = self.manifest.shards[shard]
            info = self.storage.stat(entry.name)
            if info.size != entry.bytes:
                raise ShardError(entry.name, "length", f"is {info.size} bytes long, the manifest says {entry.bytes}")
            known = info.version
            with self._lock:
                self._versions[shard] = known
        return known

    def _fetched(self, count: int) -> None:
        with self._lock:
            self.bytes_fetched += count

    def sizes(self) -> Iterator[tuple[str, int, int | None]]:
        expected = dict(self.expected_sizes())
        if len(expected) > _LOOK_UP_EACH:
            # Many objects are listed by the thousand; what a listing lacks is looked up before it is called missing.
            prefix = os.path.commonprefix(list(expected))  # noqa: RUF071 - a prefix of names, not a folder
            listed = {info.name: info.size for info in self.storage.walk(prefix)}
            rest = [name for name, size in expected.items() if listed.get(name) != size]
            yield from ((name, size, size) for name, size in expected.items() if listed.get(name) == size)
        else:
            rest = list(expected)
        with ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="ardist-sizes") as pool:
            for name, found in zip(rest, pool.map(self._size, rest), strict=True):
                yield name, expected[name], found

    def _size(self, name: str) -> int | None:
        try:
            return self.storage.size(name)
        except MissingObjectError:
            return None

    def metrics(self) -> dict[str, float]:
        return {
            "cache_hits": float(self._cache.hits),
            "cache_misses": float(self._cache.misses),
            "cache_evicted": float(self._cache.evicted),
            "bytes_fetched": float(self.bytes_fetched),
            "reads_repeated": float(self._reads.repeated + self._index_reads.repeated),
            "repeated_reads_won": float(self._reads.won + self._index_reads.won),
        }


def open_source(config: DataConfig, path: str, manifest: Manifest) -> ShardSource:
    """Where the shards of the dataset at `path` are read from: in place on this machine, else through the cache."""
    storage = open_storage(path)
    if not is_remote(path):
        return LocalSource(storage, manifest)
    directory = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    return RemoteSource(storage, manifest, DiskCache(directory, config.cache_bytes), config.hedge_after)
