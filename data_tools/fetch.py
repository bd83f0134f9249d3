"""A source on this machine: itself, or a copy of a remote object whose bytes are known to be the right ones."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from ardist.events import events
from ardist.storage import ChangedObjectError, MissingObjectError, Storage, StorageError, open_storage
from ardist.storage.base import DeniedObjectError, UnreadableObjectError
from data_tools.reasons import Reason, Refusal
from data_tools.sources import SourceRoot

FETCHES = 4
"""How often an object is fetched at most until its bytes are what they should be."""

DENIED_IN_A_ROW = 5
"""So many objects denied one after the other are no longer a matter of single objects, but of the credentials."""

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class local_copy:
    """A local path to a source for the length of a block: itself, or a temporary copy of a remote object.

    A copy is compared with `sha256`, the digest that the source had when it was probed; without one, with the
    object's ETag where that is the MD5 of the bytes. Wrong bytes are fetched again and counted. With `doubted`, the
    sha256 of an earlier copy, bytes are taken when two fetches agree on them. After `__enter__`, `digest` is the
    copy's sha256 and `checked` says whether it was compared with anything. `others` are names of objects that could
    be read once: when this one is denied, and they are too, it is the credentials.

    Raises `Refusal` for what is the object's own fault, `StorageError` for a store or a disk that fails.
    """

    def __init__(
        self,
        root: SourceRoot,
        name: str,
        version: str,
        staging: Path,
        sha256: str | None = None,
        *,
        doubted: str | None = None,
        others: Iterable[str] = (),
    ) -> None:
        self._root, self._name, self._version, self._staging = root, name, version, staging
        self._expected, self._doubted, self._others = sha256, doubted, others
        self._copy: Path | None = None
        self.digest, self.checked = "", False

    def __enter__(self) -> tuple[str, str | None]:
        if not self._root.remote:
            return self._root.path(self._name), self._version
        try:
            handle, copy = tempfile.mkstemp(dir=self._staging, prefix="source-")
            os.close(handle)
            self._copy = Path(copy)
            self.digest = self._fetched(open_storage(self._root.address), self._copy)
        except OSError as error:
            self._discard()
            raise StorageError(
                f"cannot write a copy of {self._root.address}/{self._name} in {self._staging}: "
                f"{error.strerror or error}; make room there, or name another folder in TMPDIR, and run build again"
            ) from error
        except BaseException:
            self._discard()
            raise
        return str(self._copy), None

    def __exit__(self, *_: object) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._copy is not None:
            self._copy.unlink(missing_ok=True)

    def _fetched(self, storage: Storage, copy: Path) -> str:
        """The sha256 of a copy whose bytes are right as far as anyone can tell."""
        md5 = self._md5()
        seen = [] if self._doubted is None else [self._doubted]
        for number in range(1, FETCHES + 1):
            digest = self._fetch(storage, copy)
            if self._expected is not None:
                self.checked = digest == self._expected
            elif md5 is not None:
                self.checked = _md5_of(copy) == md5
            elif digest in seen:
                self.checked = True
            elif not seen:
                return digest
            if self.checked:
                return digest
            if digest in seen and self._expected is None:
                # Two fetches agree, and not with the ETag: then this store's ETags are no MD5.
                _access(self._root.address).etags_are_md5 = False
                self.checked = True
                return digest
            events.count("build.wrong_bytes", source=self._name, fetch=number, got=digest[:12])
            if digest in seen:
                raise Refusal(Reason.CHANGED, f"{number} fetches of the same version gave other bytes than its probe")
            seen.append(digest)
        raise Refusal(Reason.CHANGED, f"{FETCHES} fetches of the same version gave wrong bytes, others each time")

    def _md5(self) -> str | None:
        """The MD5 that the listing gives, or None where its ETag is something else (parts, encryption)."""
        found = _MD5.fullmatch(self._version)
        return found[1] if found and _access(self._root.address).etags_are_md5 else None

    def _fetch(self, storage: Storage, copy: Path) -> str:
        access = _access(self._root.address)
        try:
            digest = storage.download(self._name, copy, self._version)
        except MissingObjectError as error:
            raise Refusal(Reason.VANISHED, str(error)) from None
        except ChangedObjectError as error:
            raise Refusal(Reason.CHANGED, str(error)) from None
        except UnreadableObjectError as error:
            raise Refusal(Reason.UNREADABLE, str(error)) from None
        except DeniedObjectError as error:
            access.denied(storage, self._name, error, self._others)
            raise Refusal(Reason.UNREADABLE, str(error)) from None
        access.granted(self._name)
        return digest


class _Access:
    """What this process was granted and denied below one root: tells a denied object from denied credentials."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._denied: set[str] = set()
        self._readable = ""
        self.etags_are_md5 = True

    def granted(self, name: str) -> None:
        """An object was read."""
        with self._lock:
            self._denied.clear()
            self._readable = name

    def denied(self, storage: Storage, name: str, error: DeniedObjectError, others: Iterable[str]) -> None:
        """An object was denied; raises `StorageError` when it is not this object's matter alone."""
        with self._lock:
            self._denied.add(name)
            count, readable = len(self._denied), self._readable
        advice = "give them s3:GetObject (and kms:Decrypt) there and run build again"
        if count >= DENIED_IN_A_ROW:
            raise StorageError(f"{error}: {count} objects in a row were denied, {advice}") from error
        denied_too = [
            _may_not_be_read(storage, other)
            for other in ([readable] if readable else itertools.islice(others, DENIED_IN_A_ROW))
        ]
        if denied_too and all(denied_too):
            raise StorageError(f"{error}, nor read what could be read before, {advice}") from error


def _may_not_be_read(storage: Storage, name: str) -> bool:
    try:
        storage.read(name, 0, 1)
    except DeniedObjectError:
        return True
    except (MissingObjectError, UnreadableObjectError):
        pass  # gone or archived meanwhile, which says nothing about the credentials
    return False


_accesses: dict[str, _Access] = {}


def _access(address: str) -> _Access:
    return _accesses.setdefault(address, _Access())


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
