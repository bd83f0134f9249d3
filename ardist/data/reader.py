"""Reads samples of shards into the rows of a batch and trusts nothing: length, hash, header and values are checked.

Files are read with ``preadv`` and never mapped: a mapped file that shrinks or fails kills the process with SIGBUS,
a read says so.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import threading
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import xxhash

from ardist import fault
from ardist.data.batch import HEADER_ROOM, RowBuffer
from ardist.data.errors import ShardError
from ardist.data.manifest import ShardEntry
from ardist.data.sample import NUMPY_DTYPES, check_npy, key_from_int
from ardist.data.source import MissingObjectError, ShardSource
from ardist.data.tar_index import TarIndex, build_index
from ardist.errors import DataError
from ardist.events import events

_TRANSIENT: Final = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT}
_TRIES: Final = 3
_REMEMBERED: Final = 100_000


class BadSample(NamedTuple):
    """A row of a batch that could not be filled, and why."""

    slot: int
    error: ShardError


class OpenShard:
    """A shard ready to be read: an open file and the columns of its index. Closed when nobody refers to it."""

    def __init__(self, entry: ShardEntry, path: Path, index: TarIndex) -> None:
        self.entry, self.name, self.path = entry, entry.name, path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        found = os.fstat(self.fd).st_size
        if found != entry.bytes:
            raise ShardError(self.name, "length", f"is {found} bytes long, the manifest says {entry.bytes}")
        records = np.asarray(index.records)
        self.offsets, self.sizes = records["offset"], records["size"]
        self.hashes, self.keys, self.class_ids = records["hash"], records["key"], records["class_id"]
        self.member_size = int(np.median(self.sizes))
        self.header_length = self.member_size - math.prod(entry.shape) * NUMPY_DTYPES[entry.dtype].itemsize
        if not 10 <= self.header_length <= HEADER_ROOM:
            raise ShardError(self.name, "header", _wrong_size(self, 0))

    def error(self, row: int, reason: str, detail: str) -> ShardError:
        """An error that names the shard, the offset and the sample of `row`."""
        return ShardError(self.name, reason, detail, self.offsets.item(row), key_from_int(self.keys.item(row)))


class SampleReader:
    """Random access to the samples of a dataset; safe to share between threads.

    At most `max_open` shards are open at a time, least recently used first closed.
    """

    def __init__(self, source: ShardSource, *, max_open: int = 256, num_classes: int | None = None) -> None:
        self._source, self._max_open = source, max(1, max_open)
        self._num_classes = 2**31 if num_classes is None else num_classes
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._refused: dict[int, ShardError] = {}
        self._headers: set[bytes] = set()
        self._bad: dict[tuple[int, int], ShardError] = {}
        self.retries = 0

    def after_fork(self) -> None:
        """Forget locks that a thread of the parent may have held; open files are shared and stay good for ``pread``."""
        self._lock, self._opening = threading.Lock(), {}

    def refuse(self, shard: int, error: ShardError) -> None:
        """Treat every sample of a shard as bad from now on."""
        with self._lock:
            self._refused[shard] = error
            self._open.pop(shard, None)

    def shard(self, number: int) -> OpenShard:
        """The open shard; raises the `ShardError` for which it was refused."""
        with self._lock:
            if number in self._refused:
                raise self._refused[number]
            found = self._open.get(number)
            if found is not None:
                self._open.move_to_end(number)
                return found
            turn = self._opening.setdefault(number, threading.Lock())
        with turn:
            with self._lock:
                if number in self._open:
                    return self._open[number]
            try:
                opened = self._open_shard(number)
            except ShardError as error:
                self.refuse(number, error)
                events.count("loader.shard_refused", shard=error.shard, reason=error.reason, detail=error.detail)
                raise
            with self._lock:
                self._open[number] = opened
                self._opening.pop(number, None)
                while len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            return opened

    def _open_shard(self, number: int) -> OpenShard:
        entry = self._source.manifest.shards[number]
        path = self._source.tar(number)
        try:
            return OpenShard(entry, path, self._index(number, entry, path))
        except FileNotFoundError:
            raise ShardError(entry.name, "missing", "the file is missing") from None
        except OSError as error:
            raise ShardError(entry.name, "missing", f"cannot be opened: {error.strerror}") from None

    def _index(self, number: int, entry: ShardEntry, path: Path) -> TarIndex:
        try:
            data = self._source.index(number)
            found = hashlib.sha256(data).hexdigest()
            if found != entry.index_sha256:
                raise ShardError(
                    entry.name,
                    "index",
                    f"its index has sha256 {found[:16]}…, not {entry.index_sha256[:16]}…",
                )
            return TarIndex.open(data, name=entry.name, tar_size=entry.bytes, tar_sha256=entry.sha256, n=entry.n)
        except (ShardError, MissingObjectError) as error:
            events.count("loader.index_rebuilt", shard=entry.name, reason=str(error))
        index = build_index(path, shape=entry.shape, dtype=entry.dtype)
        if index.tar_sha256 != entry.sha256 or len(index) != entry.n:
            raise ShardError(
                entry.name,
                "index",
                f"its index cannot be used, and the tar is not the manifest's either: {len(index)} samples of "
                f"{entry.n}, sha256 {index.tar_sha256[:16]}… instead of {entry.sha256[:16]}…",
            )
        return index

    def read(
        self, shards: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], buffer: RowBuffer, slot: int = 0
    ) -> list[BadSample]:
        """Fill rows `slot`, `slot` + 1, … of the buffer with these samples; returns the rows that are not good.

        shards, rows: [m], shard number and row in it. A bad row holds anything and must not be served.
        """
        bad: dict[int, ShardError] = {}
        # In the order of the files, which is the order that disks and read-ahead like.
        order = np.lexsort((rows, shards))
        hasher = xxhash.xxh3_64()
        current, shard = -1, None
        for place, number, row in zip(order.tolist(), shards[order].tolist(), rows[order].tolist(), strict=True):
            try:
                if shard is None or number != current:
                    current, shard = number, None
                    shard = self.shard(number)
                if (number, row) in self._bad:
                    raise self._bad[number, row]
                self._read_row(shard, row, buffer, place + slot, hasher)
            except ShardError as error:
                bad[place + slot] = error
        self._check_contents(shards, rows, buffer, slot, bad)
        for here, error in bad.items():
            if error.reason != "read" and len(self._bad) < _REMEMBERED:
                self._bad[int(shards[here - slot]), int(rows[here - slot])] = error
        return [BadSample(here, error) for here, error in sorted(bad.items())]

    def _read_row(self, shard: OpenShard, row: int, buffer: RowBuffer, slot: int, hasher: Any) -> None:
        """Read one member into a row and compare its hash; the hot path of the loader."""
        size = shard.member_size
        if shard.sizes.item(row) != size:
            raise shard.error(row, "header", _wrong_size(shard, row))
        target = buffer.targets[slot] if shard.header_length == buffer.header_length else _pieces(shard, buffer, slot)
        try:
            complete = os.preadv(shard.fd, target, shard.offsets.item(row)) == size
        except OSError:
            complete = False
        if complete:
            hasher.reset()
            hasher.update(target[0])
            hasher.update(target[1])
            complete = hasher.intdigest() == shard.hashes.item(row)
        if not complete:
            self._read_again(shard, row, target)
        label = shard.class_ids.item(row)
        if label >= self._num_classes:
            raise shard.error(row, "label", f"class id {label}, but the dataset has {self._num_classes} classes")
        buffer.keys[slot] = shard.keys.item(row)
        buffer.class_ids[slot] = label

    def _read_again(self, shard: OpenShard, row: int, target: list[memoryview]) -> None:
        """The slow path of a read that failed, was short or does not hash right; raises `ShardError`."""
        offset, problem = shard.offsets.item(row), shard.error(row, "read", "not read")
        for attempt in range(_TRIES):
            self.retries += 1
            events.count("loader.read_retry", shard=shard.name, offset=offset, attempt=attempt + 1)
            try:
                fault.point("data.read_again")
                data = _read_fully(shard.fd, offset, shard.member_size)
            except OSError as error:
                problem = shard.error(row, "read", f"cannot be read: {error.strerror}")
                if error.errno not in _TRANSIENT:
                    break
                time.sleep(0.05 * 4**attempt)
                continue
            if len(data) != shard.member_size:
                problem = shard.error(row, "length", f"ends after {len(data)} of {shard.member_size} bytes")
                break
            if xxhash.xxh3_64_intdigest(data) == shard.hashes.item(row):
                target[0][:] = data[: shard.header_length]
                target[1][:] = data[shard.header_length :]
                return
            # The same bytes twice: it is not the way to them that is at fault.
            problem = shard.error(row, "checksum", "its bytes do not have the xxh3-64 of the index")
            break
        raise problem

    def _check_contents(
        self,
        shards: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        buffer: RowBuffer,
        slot: int,
        bad: dict[int, ShardError],
    ) -> None:
        """Add to `bad` the rows whose header is not the dataset's or whose numbers are not finite."""
        count = len(shards)
        heads = buffer.heads[slot : slot + count]
        for place in np.flatnonzero((heads[:, : buffer.header_length] != buffer.expected).any(axis=1)).tolist():
            if place + slot not in bad:
                self._check_header(self.shard(int(shards[place])), int(rows[place]), buffer, place + slot, bad)
        for here in buffer.nonfinite_rows(slot, slot + count):
            if here not in bad:
                shard = self.shard(int(shards[here - slot]))
                bad[here] = shard.error(int(rows[here - slot]), "nonfinite", "holds NaN or infinity")

    def _check_header(
        self, shard: OpenShard, row: int, buffer: RowBuffer, slot: int, bad: dict[int, ShardError]
    ) -> None:
        """Parse a header that is not byte for byte ours; another writer's padding is as good."""
        head = buffer.heads[slot, : shard.header_length].tobytes()
        if head in self._headers:
            return
        try:
            check_npy(head, shard.member_size, buffer.shape, buffer.dtype)
        except DataError as error:
            bad[slot] = shard.error(row, "header", str(error))
        else:
            self._headers.add(head)

    def close(self) -> None:
        """Close every shard and the source."""
        with self._lock:
            self._open.clear()
        self._source.close()


def _pieces(shard: OpenShard, buffer: RowBuffer, slot: int) -> list[memoryview]:
    """Read target for a shard whose npy headers are longer or shorter than ours."""
    return [memoryview(cast(Any, buffer.heads[slot]))[: shard.header_length], buffer.payload[slot]]


def _wrong_size(shard: OpenShard, row: int) -> str:
    values = math.prod(shard.entry.shape) * NUMPY_DTYPES[shard.entry.dtype].itemsize
    return (
        f"its npy member is {shard.sizes.item(row)} bytes long; {shard.entry.dtype} {list(shard.entry.shape)} needs a "
        f"header and {values} bytes"
    )


def _read_fully(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer only at the end of the file."""
    data = bytearray()
    while len(data) < size:
        piece = os.pread(fd, size - len(data), offset + len(data))
        if not piece:
            break
        data += piece
    return bytes(data)
