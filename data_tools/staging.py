"""Private folders for unfinished work, locked by their owner and removed when the owner is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ardist.events import events
from ardist.storage import LocalStorage, Storage, StorageError
from ardist.storage.local import TEMPORARY

STAGING = f"{TEMPORARY}build-"
_LOCK = "lock"


@contextlib.contextmanager
def staging_folder(storage: Storage) -> Iterator[Path]:
    """A folder of our own: inside a local output, so that finishing is a rename, else among temporary files.

    Folders of builders that died are removed on the way: nobody holds their lock any more.
    """
    parent = _parent(storage)
    for folder in parent.glob(f"{STAGING}*"):
        if not is_locked(folder):
            shutil.rmtree(folder, ignore_errors=True)
            events.count("build.staging_removed", folder=folder, level=20)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{TEMPORARY}new-"))
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Renamed once it is locked: a folder with the final name and no lock holder is dead for certain.
        folder = folder.rename(folder.with_name(folder.name.replace(f"{TEMPORARY}new-", STAGING)))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def writing(what: str, storage: Storage) -> Iterator[None]:
    """While `what` is written in a staging folder: a full or broken disk is one `StorageError` that names the place."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        elsewhere = "" if isinstance(storage, LocalStorage) else ", or name another folder in TMPDIR,"
        raise StorageError(
            f"cannot write {what} in {_parent(storage)}: {reason}; make room there{elsewhere} and run build again"
        ) from error


def _parent(storage: Storage) -> Path:
    return storage.root if isinstance(storage, LocalStorage) else Path(tempfile.gettempdir())


def is_locked(folder: Path) -> bool:
    """Whether somebody alive holds the folder's lock."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
