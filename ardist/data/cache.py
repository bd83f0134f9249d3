"""A local cache of remote bytes, shared by the processes of one machine and user.

Entries are named by their content, written beside their place and renamed, filled under a file lock by one process
while the others wait, and evicted least recently used first. An entry that is deleted while somebody reads it stays
readable for them: what is handed out is an open file, not a path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ardist import fault
from ardist.errors import HardwareError
from ardist.events import events

_STRIPES: Final = 256
_UNSEEN: Final = 128
"""The part of the limit that one cache adds, at most, between two looks at what all of them keep."""

_NAME: Final = re.compile(r"[0-9a-f]{64}(-\d+-\d+)?")
_TEMPORARY: Final = ".filling"


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/ardist`` or ``~/.cache/ardist``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ardist"


class DiskCache:
    """Files below `directory`, at most `limit` bytes of them beyond what is open at the moment.

    Several that share a folder, in one process or in many, may pass the limit together by a 128th of it each.

    Raises `HardwareError` where the folder cannot be used or its disk is full.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._root = Path(os.path.abspath(directory)) / "shards"
        self._limit = limit
        self._found: int | None = None
        self._added = 0
        self.after_fork()
        self.hits = self.misses = self.evicted = 0
        try:
            self._root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self._root, self._root / "locks"):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
                self._check_private(folder)
        except OSError as error:
            raise HardwareError(f"the cache folder {directory} cannot be used: {error.strerror}") from error

    def after_fork(self) -> None:
        """Forget a lock that a thread of the parent may have held."""
        self._lock = threading.Lock()

    @staticmethod
    def _check_private(folder: Path) -> None:
        """Refuse a folder that somebody else could fill for us."""
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise HardwareError(f"{folder} must be a folder of this user that nobody else can write to")

    def open(self, name: str, size: int, fill: Callable[[Path], None]) -> int:
        """A read-only file descriptor of the entry, filled by `fill(path)` where it is absent; the caller closes it.

        `name`: the sha256 of what it is part of, and the byte range. `fill` writes `size` bytes or raises.
        """
        assert _NAME.fullmatch(name), name
        path = self._root / name[:2] / name
        found = self._open_entry(path, size)
        if found is None:
            with self._locked(int(name[:2], 16) % _STRIPES):
                # Another thread or process may have filled it while we waited.
                found = self._open_entry(path, size)
                if found is None:
                    self.misses += 1
                    return self._fill(path, size, fill)
        self.hits += 1
        return found

    def _open_entry(self, path: Path, size: int) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        if os.fstat(descriptor).st_size == size:
            # Marks it as used; whoever evicts looks at the time of the last change.
            with contextlib.suppress(OSError):
                os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        self.discard(path.name, f"has another size than {size}")
        return None

    def _fill(self, path: Path, size: int, fill: Callable[[Path], None]) -> int:
        temporary = path.with_name(path.name + _TEMPORARY)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            # The lock is ours, so a file under this name is what a killed process left.
            temporary.unlink(missing_ok=True)
            try:
                fill(temporary)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                events.count("cache.disk_full", folder=self._root)
                temporary.unlink(missing_ok=True)
                self.shrink(0)
                fill(temporary)
            descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.fstat(descriptor).st_size != size:
                os.close(descriptor)
                raise AssertionError(f"an entry of {size} bytes was filled with another number of bytes")
            fault.point("cache.before_rename")
            os.replace(temporary, path)
        except OSError as error:
            raise HardwareError(f"the cache {self._root} cannot be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        self._grown(size)
        return descriptor

    def _grown(self, size: int) -> None:
        """An entry was added: look for what to evict where the limit may be passed.

        Looking takes as long as there are entries. So it is done when what is known here would pass the limit, and each
        time a small part of it was added here, because others add to the same folder.
        """
        with self._lock:
            self._added += size
            most = self._limit - self._found if self._found is not None else 0
            if self._added <= min(most, self._limit // _UNSEEN):
                return
            # Where it is full, room for more than one entry is made, so that not each of them has to look.
            spare = self._limit // _UNSEEN
            self._found, self._added = self.shrink(self._limit, spare if spare >= size else 0), 0

    def discard(self, name: str, reason: str) -> None:
        """Remove an entry that turned out to be damaged."""
        events.count("cache.entry_discarded", entry=name, reason=reason)
        with contextlib.suppress(FileNotFoundError):
            (self._root / name[:2] / name).unlink()

    def shrink(self, limit: int, spare: int = 0) -> int:
        """Where more than `limit` bytes are kept, evict the entries used least recently until `spare` bytes more are
        free; returns how many are left."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        most = limit if total <= limit else limit - spare
        for _, size, path in entries:
            if total <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                self.evicted += 1
                events.count("cache.evicted", level=logging.DEBUG, entry=path.name)
            total -= size
        return total

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every finished entry."""
        for folder in os.scandir(self._root):
            if len(folder.name) != 2 or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                if _NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield found.st_mtime_ns, found.st_size, Path(entry.path)

    @contextlib.contextmanager
    def _locked(self, stripe: int) -> Iterator[None]:
        """Exclusive among threads and processes; released by the system when its holder dies."""
        path = self._root / "locks" / f"{stripe:02x}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
