"""What every storage can do, and the errors it may raise."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ardist.errors import DataError, HardwareError, InvalidValueError

COPY_CHUNK = 8 * 2**20
"""Bytes moved at a time when an object goes to or comes from a file."""

CONDITION_PROBE = "probe-"
"""How the short-lived objects of `check_conditional_create` begin."""


class StorageError(HardwareError):
    """The store cannot be reached, denies the request or has no space."""


class DeniedObjectError(StorageError):
    """The store denies an object: it may be this one alone, or all that these credentials ask for."""


class UnreadableObjectError(StorageError):
    """The store has an object but cannot give it out as it is: archived, or under a key that it has not."""


class MissingObjectError(DataError):
    """No object has this name."""


class ChangedObjectError(DataError):
    """The object is no longer the version that was asked for."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: name relative to the storage's root, bytes, seconds since the epoch, opaque version."""

    name: str
    size: int
    modified: float
    version: str


class Storage(ABC):
    """Named objects below one root. Names are relative, ``/``-separated. Safe to share between threads."""

    url: str
    """Address of the root, as `open_storage` reads it; holds no secrets."""

    @abstractmethod
    def stat(self, name: str) -> ObjectInfo:
        """Size, time and version of an object; raises `MissingObjectError`."""

    @abstractmethod
    def read(self, name: str, start: int | None = None, length: int | None = None, version: str | None = None) -> bytes:
        """The object's bytes, or `length` of them from `start`; fewer only where the object ends.

        With `version` (of an `ObjectInfo`) a replaced object raises `ChangedObjectError` instead of mixing two.
        """

    @abstractmethod
    def walk(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose names begin with `prefix`, sorted by name. Unfinished writes are not among them."""

    @abstractmethod
    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> None:
        """Store bytes or a file's content under `name`: afterwards the old object or the whole new one is there.

        With `move` the file may be consumed, which saves a copy where source and target share a file system.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Store `data` unless `name` exists: True for exactly one of any number of competing callers."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; nothing happens when there is none."""

    @abstractmethod
    def local_path(self, name: str) -> Path | None:
        """The object's path on this machine, or None for a remote store."""

    def check_conditional_create(self) -> None:  # noqa: B027 - most stores have nothing to check
        """Raise `StorageError` for a store that lets two callers create the same object; a folder never does."""

    def size(self, name: str) -> int:
        """Bytes of an object; raises `MissingObjectError`."""
        return self.stat(name).size

    def exists(self, name: str) -> bool:
        """Whether an object has this name."""
        try:
            self.stat(name)
        except MissingObjectError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names that begin with `prefix`, sorted."""
        return (info.name for info in self.walk(prefix))

    @abstractmethod
    def stream(
        self,
        name: str,
        take: Callable[[bytes], object],
        start: int | None = None,
        length: int | None = None,
        version: str | None = None,
    ) -> int:
        """Hand the bytes that `read` would give to `take`, in pieces of a moderate size; returns how many they were."""

    def download(self, name: str, path: Path, version: str | None = None) -> str:
        """Copy an object into a new local file and return its sha256; one version throughout."""
        digest = hashlib.sha256()
        with path.open("wb") as file:

            def take(piece: bytes) -> None:
                digest.update(piece)
                file.write(piece)

            self.stream(name, take, version=version)
        return digest.hexdigest()


def check_range(start: int | None, length: int | None) -> tuple[int, int | None]:
    """(start, length) with the default filled in; raises `InvalidValueError` for negative numbers."""
    if (start or 0) < 0 or (length or 0) < 0:
        raise InvalidValueError(f"a byte range has start >= 0 and length >= 0, not start={start}, length={length}")
    return start or 0, length
