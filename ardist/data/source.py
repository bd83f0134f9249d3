"""Where the bytes of a dataset's shards come from."""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final, TypeAlias

from ardist.data.errors import ShardError
from ardist.data.manifest import Manifest, ShardEntry
from ardist.data.tar_index import CONTEXT_RECORD, HEADER, RECORD
from ardist.storage import Storage

MAPPED_FROM: Final = 4 * 2**20
"""Longer indexes are memory-mapped, so that the samples of a giant shard cost no memory."""

IndexBytes: TypeAlias = bytes | memoryview


def index_size(entry: ShardEntry) -> int:
    """Bytes of a shard's index."""
    record = RECORD if entry.context_shape is None else CONTEXT_RECORD
    return HEADER.itemsize + entry.n * record.itemsize


def read_or_map(descriptor: int) -> IndexBytes:
    """The content of an open file, as a memory map where it is long; closes the descriptor."""
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= MAPPED_FROM:
            return file.read()
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


class ShardSource(ABC):
    """Bytes of the shards and indexes of one dataset, by shard number. Safe to share between threads.

    A shard is read in `parts`: runs of its samples that are fetched at once.
    """

    looks_are_free = True
    """Whether every rank may ask for the sizes of all files."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage, self.manifest = storage, manifest

    @abstractmethod
    def parts(self, shard: int) -> int:
        """In how many parts a shard is read."""

    @abstractmethod
    def index(self, shard: int) -> IndexBytes:
        """The bytes of the index; raises `MissingObjectError`, or `ShardError` where they are not the manifest's."""

    @abstractmethod
    def open(self, shard: int, start: int, stop: int) -> tuple[int, int]:
        """(file descriptor, byte of the tar at which it begins) for the bytes [start, stop) of a tar.

        May take as long as a download. The caller closes it. Raises `ShardError`.
        """

    @abstractmethod
    def discard(self, shard: int, start: int, stop: int, reason: str) -> bool:
        """Forget a local copy of these bytes that is damaged; False where there is no other copy to try."""

    @abstractmethod
    def sizes(self) -> Iterator[tuple[str, int, int | None]]:
        """(name, bytes by the manifest, bytes found or None) of every tar and index of the dataset."""

    def advise(self, descriptor: int, start: int, stop: int) -> None:
        """Say that these bytes of an open file will be read soon."""
        return

    def after_fork(self) -> None:  # noqa: B027 - most sources hold no lock
        """Forget locks that a thread of the parent may have held."""

    def metrics(self) -> dict[str, float]:
        """Counters of this source."""
        return {}

    def expected_sizes(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every tar and index as the manifest gives them."""
        for shard in self.manifest.shards:
            yield shard.name, shard.bytes
            yield shard.index_name, index_size(shard)


class LocalSource(ShardSource):
    """Shards in a folder of this machine or of a mounted file system: read where they are."""

    def parts(self, shard: int) -> int:
        return 1

    def index(self, shard: int) -> IndexBytes:
        entry = self.manifest.shards[shard]
        path = self.storage.local_path(entry.index_name)
        if index_size(entry) <= MAPPED_FROM or path is None or not path.exists():
            return self.storage.read(entry.index_name)
        return read_or_map(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def open(self, shard: int, start: int, stop: int) -> tuple[int, int]:
        name = self.manifest.shards[shard].name
        path = self.storage.local_path(name)
        assert path is not None
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
        except FileNotFoundError:
            raise ShardError(name, "missing", "the file is missing") from None
        except OSError as error:
            raise ShardError(name, "missing", f"cannot be opened: {error.strerror}") from None

    def discard(self, shard: int, start: int, stop: int, reason: str) -> bool:
        return False

    def advise(self, descriptor: int, start: int, stop: int) -> None:
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def sizes(self) -> Iterator[tuple[str, int, int | None]]:
        for name, size in self.expected_sizes():
            path = self.storage.local_path(name)
            assert path is not None
            try:
                found: int | None = path.stat().st_size
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
