"""The shards and parts of shards that are open at the moment."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ardist.data.batch import HEADER_ROOM
from ardist.data.errors import ShardError
from ardist.data.manifest import ShardEntry
from ardist.data.sample import CONTEXT_DTYPE, NUMPY_DTYPES, SampleDtype, key_from_int
from ardist.data.source import ShardSource
from ardist.data.tar_index import CONTEXT_RECORD, TarIndex, build_index
from ardist.events import events
from ardist.storage import MissingObjectError

Key = TypeVar("Key")
Value = TypeVar("Value")


class OpeningCache(Generic[Key, Value]):
    """The values used last, each made by one thread while others that want it wait; safe to share."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self.after_fork()

    def after_fork(self) -> None:
        """Forget locks that a thread of the parent may have held."""
        self._lock = threading.Lock()
        self._making: dict[Key, threading.Lock] = {}

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made now where it is not at hand."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            turn = self._making.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            value = make()
            with self._lock:
                self._values[key] = value
                self._making.pop(key, None)
                while len(self._values) > self._limit:
                    self._values.popitem(last=False)
            return value

    def drop(self, key: Key) -> None:
        """Forget one value."""
        with self._lock:
            self._values.pop(key, None)

    def close(self) -> None:
        """Forget all values and keep none from now on."""
        with self._lock:
            self._limit = 0
            self._values.clear()


class Members:
    """The members of one kind in a shard, one of each sample: where they are, and what they look like."""

    def __init__(
        self,
        what: str,
        shape: tuple[int, ...],
        dtype: SampleDtype,
        offsets: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.uint32],
        hashes: npt.NDArray[np.uint64],
    ) -> None:
        self._what, self._shape, self._dtype = what, shape, dtype
        self.offsets, self.sizes, self.hashes = offsets, sizes, hashes
        self.same_sizes = bool((sizes == sizes[0]).all())
        self.member_size = int(sizes[0] if self.same_sizes else np.median(sizes))
        self.header_length = self.member_size - self._values()

    def _values(self) -> int:
        return math.prod(self._shape) * NUMPY_DTYPES[self._dtype].itemsize

    def wrong_size(self, row: int) -> str:
        """What to say about a member of another length than the dataset's shape takes."""
        return (
            f"its {self._what} member is {self.sizes.item(row)} bytes long; {self._dtype} {list(self._shape)} needs a "
            f"header and {self._values()} bytes"
        )


class OpenShard:
    """The columns of a shard's index: its samples' values, and their context where they have one."""

    def __init__(self, number: int, entry: ShardEntry, index: TarIndex, parts: int) -> None:
        self.number, self.entry, self.name, self.parts = number, entry, entry.name, parts
        records = np.asarray(index.records)
        self.keys, self.class_ids = records["key"], records["class_id"]
        self.highest_class = int(self.class_ids.max())
        columns = records["offset"], records["size"], records["hash"]
        self.values = Members("npy", entry.shape, entry.dtype, *columns)
        self.context: Members | None = None
        if entry.context_shape is not None:
            if records.dtype != CONTEXT_RECORD:
                raise ShardError(self.name, "index", "its index names no context, but the manifest says there is one")
            columns = records["context_offset"], records["context_size"], records["context_hash"]
            self.context = Members("context", entry.context_shape, CONTEXT_DTYPE, *columns)
        self.kinds = [self.values] if self.context is None else [self.values, self.context]
        for members in self.kinds:
            if not 10 <= members.header_length <= HEADER_ROOM:
                raise ShardError(self.name, "header", members.wrong_size(0))

    def error(self, row: int, reason: str, detail: str, members: Members | None = None) -> ShardError:
        """An error that names the shard, the sample of `row`, and the offset of its values or another member."""
        offset = (members or self.values).offsets.item(row)
        return ShardError(self.name, reason, detail, offset, key_from_int(self.keys.item(row)))

    def extent(self, first: int, last: int) -> tuple[int, int]:
        """[start, stop) bytes of the tar with all members of rows first..last."""
        start = min(members.offsets.item(first) for members in self.kinds)
        return start, max(members.offsets.item(last) + members.sizes.item(last) for members in self.kinds)

    def part_of(self, row: int) -> int:
        """The part that holds `row`: part k has the rows [n k / parts, n (k + 1) / parts), rounded down."""
        return ((row + 1) * self.parts - 1) // self.entry.n

    def rows(self, part: int) -> tuple[int, int]:
        """[first, last) rows of a part."""
        return self.entry.n * part // self.parts, self.entry.n * (part + 1) // self.parts

    def span(self, part: int) -> tuple[int, int]:
        """[start, stop) bytes of the tar that a part needs: all of it where there is only one."""
        if self.parts == 1:
            return 0, self.entry.bytes
        first, stop = self.rows(part)
        return self.extent(first, stop - 1)


class OpenPart:
    """An open file with the bytes of some rows of a shard. Closed when nobody refers to it."""

    def __init__(self, shard: OpenShard, part: int, source: ShardSource) -> None:
        self.shard, self.part = shard, part
        self.first, self.last = shard.rows(part)
        start, stop = shard.span(part)
        self.fd, self.base = source.open(shard.number, start, stop)
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        # The end of the program closes files by itself; before it a thread may still be reading.
        self._finalizer.atexit = False
        found = os.fstat(self.fd).st_size
        if found != stop - start:
            raise ShardError(shard.name, "length", f"is {found} bytes long, the manifest says {stop - start}")


class ShardTable:
    """Opens shards on demand and keeps the `max_open` parts used last; safe to share between threads.

    A shard that cannot be used is refused once and for all: its `ShardError` is remembered and raised again.
    """

    def __init__(self, source: ShardSource, max_open: int) -> None:
        self._source = source
        self._shards: OpeningCache[int, OpenShard] = OpeningCache(max_open)
        self._parts: OpeningCache[tuple[int, int], OpenPart] = OpeningCache(max_open)
        self._refused: dict[int, ShardError] = {}
        self._no_better: set[tuple[int, int]] = set()

    def after_fork(self) -> None:
        """Make new locks; open files are shared with the parent and stay good for ``pread``."""
        self._source.after_fork()
        self._shards.after_fork()
        self._parts.after_fork()

    def refuse(self, number: int, error: ShardError) -> None:
        """Treat every sample of a shard as bad from now on."""
        self._refused[number] = error
        self._shards.drop(number)

    def shard(self, number: int) -> OpenShard:
        """The shard's index; raises the `ShardError` for which the shard is refused."""
        if number in self._refused:
            raise self._refused[number]
        return self._guarded(number, lambda: self._shards.get(number, lambda: self._open_shard(number)))

    def part(self, number: int, row: int) -> OpenPart:
        """The open file that holds a row of a shard; raises `ShardError`."""
        shard = self.shard(number)
        part = shard.part_of(row)
        return self._guarded(number, lambda: self._parts.get((number, part), lambda: self._open_part(shard, part)))

    def _open_part(self, shard: OpenShard, part: int) -> OpenPart:
        return OpenPart(shard, part, self._source)

    def _guarded(self, number: int, work: Callable[[], Value]) -> Value:
        try:
            return work()
        except ShardError as error:
            if number not in self._refused:
                self.refuse(number, error)
                events.count("loader.shard_refused", shard=error.shard, reason=error.reason, detail=error.detail)
            raise

    def _open_shard(self, number: int) -> OpenShard:
        entry = self._source.manifest.shards[number]
        try:
            data = self._source.index(number)
            found = hashlib.sha256(data).hexdigest()
            if found != entry.index_sha256:
                detail = f"its index has sha256 {found[:16]}…, not {entry.index_sha256[:16]}…"
                raise ShardError(entry.name, "index", detail)
            index = TarIndex.open(data, name=entry.name, tar_size=entry.bytes, tar_sha256=entry.sha256, n=entry.n)
        except (ShardError, MissingObjectError) as error:
            index = self._rebuild_index(number, entry, str(error))
        return OpenShard(number, entry, index, self._source.parts(number))

    def _rebuild_index(self, number: int, entry: ShardEntry, reason: str) -> TarIndex:
        """Read the whole tar instead of its index, if it is the manifest's tar."""
        events.count("loader.index_rebuilt", shard=entry.name, reason=reason)
        descriptor, _ = self._source.open(number, 0, entry.bytes)
        with os.fdopen(descriptor, "rb") as file:
            index = build_index(
                file, name=entry.name, shape=entry.shape, dtype=entry.dtype, context=entry.context_shape
            )
        if index.tar_sha256 != entry.sha256 or len(index) != entry.n:
            raise ShardError(
                entry.name,
                "index",
                f"its index cannot be used, and the tar is not the manifest's either: {len(index)} samples of "
                f"{entry.n}, sha256 {index.tar_sha256[:16]}… instead of {entry.sha256[:16]}…",
            )
        return index

    def replaced(self, part: OpenPart, error: ShardError) -> OpenPart | None:
        """The part fetched anew where the damaged bytes were only a copy; None where they are the original."""
        number, (start, stop) = part.shard.number, part.shard.span(part.part)
        if (number, part.part) in self._no_better or not self._source.discard(number, start, stop, str(error)):
            return None
        self._parts.drop((number, part.part))
        return self.part(part.shard.number, part.first)

    def keep(self, part: OpenPart) -> None:
        """What is wrong with a part came with the original: fetching it anew gains nothing."""
        self._no_better.add((part.shard.number, part.part))

    def prepare(self, number: int, first: int, last: int) -> None:
        """Open what rows first..last of a shard need and ask the system to read it ahead. Raises `ShardError`."""
        shard = self.shard(number)
        for part in range(shard.part_of(first), shard.part_of(last) + 1):
            opened = self.part(number, shard.rows(part)[0])
            low, high = max(first, opened.first), min(last, opened.last - 1)
            start, stop = shard.extent(low, high)
            self._source.advise(opened.fd, start - opened.base, stop - opened.base)

    def close(self) -> None:
        """Let go of every file."""
        self._parts.close()
        self._shards.close()
