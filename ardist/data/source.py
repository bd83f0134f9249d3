"""Where the shards of a dataset are on this machine."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from ardist.config.data import DataConfig
from ardist.data.manifest import Manifest
from ardist.data.tar_index import HEADER, RECORD
from ardist.storage import MissingObjectError, Storage, open_storage


class ShardSource(ABC):
    """Local files of a dataset's shards and indexes, by shard number."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage, self.manifest = storage, manifest

    @abstractmethod
    def tar(self, shard: int) -> Path:
        """A local file that holds the tar; may take as long as a download. Raises `ShardError`."""

    def index(self, shard: int) -> bytes:
        """The bytes of the index; raises `MissingObjectError`."""
        return self.storage.read(self.manifest.shards[shard].index_name)

    @abstractmethod
    def sizes(self) -> Iterator[tuple[str, int, int | None]]:
        """(name, bytes by the manifest, bytes found or None) of every tar and index of the dataset."""

    def expected_sizes(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every tar and index as the manifest gives them."""
        for shard in self.manifest.shards:
            yield shard.name, shard.bytes
            yield shard.index_name, HEADER.itemsize + shard.n * RECORD.itemsize

    def metrics(self) -> dict[str, float]:
        """Counters of this source."""
        return {}

    def close(self) -> None:
        """Release what is held."""
        return


class LocalSource(ShardSource):
    """Shards in a folder of this machine or of a mounted file system: read where they are."""

    def tar(self, shard: int) -> Path:
        path = self.storage.local_path(self.manifest.shards[shard].name)
        assert path is not None
        return path

    def sizes(self) -> Iterator[tuple[str, int, int | None]]:
        for name, size in self.expected_sizes():
            path = self.storage.local_path(name)
            assert path is not None
            try:
                found: int | None = os.stat(path).st_size
            except (FileNotFoundError, NotADirectoryError):
                found = None
            yield name, size, found


def missing_or_resized(source: ShardSource) -> dict[str, str]:
    """What is wrong with the files of a dataset, by name, without reading them."""
    return {
        name: "is missing" if found is None else f"is {found} bytes long, the manifest says {size}"
        for name, size, found in source.sizes()
        if found != size
    }


def open_source(config: DataConfig, manifest: Manifest) -> ShardSource:
    """Where the shards of `config.path` are read from."""
    return LocalSource(open_storage(config.path), manifest)


__all__ = ["LocalSource", "MissingObjectError", "ShardSource", "missing_or_resized", "open_source"]
