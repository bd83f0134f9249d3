"""A folder as storage: atomic, durable writes that never follow a link out of the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ardist import fault
from ardist.errors import InvalidValueError
from ardist.events import events
from ardist.storage.base import (
    COPY_CHUNK,
    ChangedObjectError,
    MissingObjectError,
    ObjectInfo,
    Storage,
    StorageError,
    check_range,
)

T = TypeVar("T")

TEMPORARY = ".tmp-"
"""Unfinished writes begin with this; they are invisible to `walk`."""

_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT}
_TRIES = 4


class LocalStorage(Storage):
    """Objects as files below `root`. Folders that it makes are readable by their owner only."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def local_path(self, name: str) -> Path:
        """The file's path; raises `InvalidValueError` for a name that leaves the root."""
        parts = name.split("/")
        if not name or any(part in ("", ".", "..") for part in parts) or "\0" in name:
            raise InvalidValueError(f"{name!r} is not an object name: relative, without empty, '.' or '..' parts")
        return self.root.joinpath(*parts)

    def stat(self, name: str) -> ObjectInfo:
        path = self.local_path(name)
        return self._retried(name, lambda: _info(name, path.stat()), "look up")

    def read(self, name: str, start: int | None = None, length: int | None = None, version: str | None = None) -> bytes:
        path = self.local_path(name)
        first, wanted = check_range(start, length)

        def once() -> bytes:
            fault.point("storage.local_read")
            with path.open("rb", buffering=0) as file:
                info = _info(name, os.fstat(file.fileno()))
                if version is not None and info.version != version:
                    raise ChangedObjectError(f"{path} was replaced since it was listed")
                count = max(0, info.size - first) if wanted is None else min(wanted, max(0, info.size - first))
                pieces = bytearray(count)
                view, done = memoryview(pieces), 0
                while done < count:
                    got = os.preadv(file.fileno(), [view[done:]], first + done)
                    if got == 0:
                        raise ChangedObjectError(f"{path} shrank while it was read")
                    done += got
                return bytes(pieces)

        return self._retried(name, once, "read")

    def stream(
        self,
        name: str,
        take: Callable[[bytes], object],
        start: int | None = None,
        length: int | None = None,
        version: str | None = None,
    ) -> int:
        first, wanted = check_range(start, length)
        info = self.stat(name)
        if version is not None and info.version != version:
            raise ChangedObjectError(f"{self.url}/{name} was replaced since it was listed")
        end = info.size if wanted is None else min(info.size, first + wanted)
        for at in range(first, end, COPY_CHUNK):
            piece = self.read(name, at, min(COPY_CHUNK, end - at), info.version)
            if len(piece) != min(COPY_CHUNK, end - at):
                raise ChangedObjectError(f"{self.url}/{name} shrank while it was read")
            take(piece)
        return max(0, end - first)

    def walk(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # Only the deepest folder that the prefix names is searched, not the whole root.
        folder = self.root.joinpath(*prefix.split("/")[:-1]) if "/" in prefix else self.root
        yield from sorted(
            (info for info in self._below(folder) if info.name.startswith(prefix)), key=lambda info: info.name
        )

    def _below(self, folder: Path) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StorageError(f"cannot list {folder}: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith(TEMPORARY):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._below(Path(entry.path))
            else:
                # A file may be replaced or removed between the listing and the look-up.
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    if stat.S_ISREG(found.st_mode):
                        yield _info(os.path.relpath(entry.path, self.root).replace(os.sep, "/"), found)

    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> None:
        path = self.local_path(name)
        with self._naming(name, "write"):
            self._make_folder(path.parent)
            if move and isinstance(data, Path) and self._moved(data, path):
                return
            temporary = self._written(path, data)
            try:
                fault.point("storage.local_before_rename")
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            fault.point("storage.local_after_rename")
            _sync_folder(path.parent)

    def create(self, name: str, data: bytes) -> bool:
        path = self.local_path(name)
        with self._naming(name, "create"):
            self._make_folder(path.parent)
            if path.is_symlink() or path.exists():
                return False
            temporary = self._written(path, data)
            try:
                fault.point("storage.local_before_link")
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                    raise
                return _create_exclusively(path, data)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
            return True

    def delete(self, name: str) -> None:
        with self._naming(name, "delete"):
            self.local_path(name).unlink(missing_ok=True)

    def _moved(self, source: Path, target: Path) -> bool:
        """Rename `source` to `target` durably; False when they are on different file systems."""
        with source.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.replace(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return False
        _sync_folder(target.parent)
        return True

    def _written(self, path: Path, data: bytes | Path) -> Path:
        """A synced temporary file beside `path` with the content."""
        temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, COPY_CHUNK)
                else:
                    file.write(data)
                file.flush()
                fault.point("storage.local_before_sync")
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _make_folder(self, folder: Path) -> None:
        """Create missing folders (0700); a link in place of one below the root is refused."""
        if not self.root.is_dir():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_folder(self.root.parent)
        here = self.root
        for part in folder.relative_to(self.root).parts:
            here = here / part
            with contextlib.suppress(FileExistsError):
                here.mkdir(mode=0o700)
                _sync_folder(here.parent)
            if not stat.S_ISDIR(here.lstat().st_mode):
                raise StorageError(f"{here} is not a plain folder (a link or a file); nothing was written")

    def _retried(self, name: str, once: Callable[[], T], action: str) -> T:
        """Repeat what a flaky network file system refused for a moment; every repeat is counted."""
        for attempt in range(1, _TRIES + 1):
            try:
                return once()
            except (FileNotFoundError, NotADirectoryError):
                raise MissingObjectError(f"{self.url}/{name} does not exist") from None
            except OSError as error:
                if error.errno not in _TRANSIENT or attempt == _TRIES:
                    raise StorageError(f"cannot {action} {self.url}/{name}: {error.strerror}") from error
                events.count("storage.retry", operation=action, name=name, reason=error.strerror, attempt=attempt)
                time.sleep(0.05 * 4**attempt)
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _naming(self, name: str, action: str) -> Iterator[None]:
        """Turn an OSError into one message that says what was attempted."""
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot {action} {self.url}/{name}: {error.strerror or error}") from error


def _info(name: str, found: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file", name)
    # Size, time and inode: a rename over the file changes at least the inode.
    version = hashlib.sha256(f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}".encode()).hexdigest()[:16]
    return ObjectInfo(name, found.st_size, found.st_mtime, version)


def _create_exclusively(path: Path, data: bytes) -> bool:
    """Where hard links do not exist: O_EXCL decides, and a reader may see the file grow."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
