"""Reads samples of shards into the rows of a batch and trusts nothing: length, hash, header and values are checked.

Files are read with ``preadv`` and never mapped: a mapped file that shrinks or fails kills the process with SIGBUS,
a read says so.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import xxhash

from ardist import fault
from ardist.data.batch import RowBuffer
from ardist.data.errors import ShardError
from ardist.data.open_shards import Members, OpenPart, OpenShard, ShardTable
from ardist.data.run_reader import RunReader
from ardist.data.sample import check_npy
from ardist.data.source import ShardSource
from ardist.data.window_arena import WindowRows
from ardist.errors import DataError
from ardist.events import events

_TRANSIENT: Final = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT}
_TRIES: Final = 3
_REMEMBERED: Final = 100_000


class BadSample(NamedTuple):
    """A row of a batch that could not be filled, and why."""

    slot: int
    error: ShardError


class SampleReader:
    """Random access to the samples of a dataset; safe to share between threads.

    At most `max_open` files are open at a time, least recently used first closed.
    """

    def __init__(self, source: ShardSource, *, max_open: int = 256, num_classes: int | None = None) -> None:
        self._table = ShardTable(source, max(1, max_open))
        self._num_classes = 2**31 if num_classes is None else num_classes
        self._runs = RunReader(self._table, self._num_classes)
        self._headers: set[tuple[tuple[int, ...], bytes]] = set()
        self._bad: dict[tuple[int, int], ShardError] = {}
        self.retries = 0

    def after_fork(self) -> None:
        """Forget locks that a thread of the parent may have held."""
        self._table.after_fork()

    def refuse(self, shard: int, error: ShardError) -> None:
        """Treat every sample of a shard as bad from now on."""
        self._table.refuse(shard, error)

    def prepare(self, shard: int, first: int, last: int) -> None:
        """Get rows first..last of a shard closer, because they are read soon. Raises `ShardError`."""
        self._table.prepare(shard, first, last)

    def read_run(self, number: int, first: int, last: int, memory: WindowRows, rows: npt.NDArray[np.int64]) -> None:
        """Read rows first..last of a shard into the rows `rows` of `memory` and mark those that are good.

        What is not marked must be read with `read`, which says what is wrong with it. Raises `ShardError`.
        """
        self._runs.read(number, first, last, memory, rows)

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
        part: OpenPart | None = None
        for place, number, row in zip(order.tolist(), shards[order].tolist(), rows[order].tolist(), strict=True):
            here = place + slot
            try:
                if part is None or part.shard.number != number or row >= part.last:
                    part = None
                    part = self._table.part(number, row)
                if self._bad and (number, row) in self._bad:
                    raise self._bad[number, row]
                self._read_row(part, row, buffer, here, hasher)
            except ShardError as error:
                part = self._fetch_again(part, row, buffer, here, hasher, error, bad)
        self._check_contents(shards, rows, buffer, slot, bad, of_context=False)
        if buffer.context is not None:
            self._check_contents(shards, rows, buffer.context, slot, bad, of_context=True)
        for here, problem in bad.items():
            if problem.offset is not None and problem.reason != "read" and len(self._bad) < _REMEMBERED:
                self._bad[int(shards[here - slot]), int(rows[here - slot])] = problem
        return [BadSample(here, problem) for here, problem in sorted(bad.items())]

    def _fetch_again(
        self,
        part: OpenPart | None,
        row: int,
        buffer: RowBuffer,
        slot: int,
        hasher: Any,
        error: ShardError,
        bad: dict[int, ShardError],
    ) -> OpenPart | None:
        """Read a row that was not good once more, where only a local copy may be damaged; else note it in `bad`.

        Returns the part to go on with.
        """
        copied = part is not None and error.reason in ("checksum", "length")
        fresh = None
        try:
            fresh = self._table.replaced(part, error) if part is not None and copied else None
            if fresh is None:
                raise error
            self._read_row(fresh, row, buffer, slot, hasher)
        except ShardError as problem:
            bad[slot] = problem
            if fresh is not None:
                self._table.keep(fresh)
        return fresh or part

    def _read_row(self, part: OpenPart, row: int, buffer: RowBuffer, slot: int, hasher: Any) -> None:
        """Read one sample into a row and compare its hashes; the hot path of the loader."""
        shard = part.shard
        self._read_member(part, shard.values, row, buffer, slot, hasher)
        if buffer.context is not None:
            assert shard.context is not None
            self._read_member(part, shard.context, row, buffer.context, slot, hasher)
        label = shard.class_ids.item(row)
        if shard.highest_class >= self._num_classes and label >= self._num_classes:
            raise shard.error(row, "label", f"class id {label}, but the dataset has {self._num_classes} classes")
        buffer.keys[slot] = shard.keys.item(row)
        buffer.class_ids[slot] = label

    def _read_member(
        self, part: OpenPart, members: Members, row: int, buffer: RowBuffer, slot: int, hasher: Any
    ) -> None:
        size = members.member_size
        if not members.same_sizes and members.sizes.item(row) != size:
            raise part.shard.error(row, "header", members.wrong_size(row), members)
        usual = members.header_length == buffer.header_length
        target = buffer.targets[slot] if usual else _pieces(members, buffer, slot)
        try:
            complete = os.preadv(part.fd, target, members.offsets.item(row) - part.base) == size
        except OSError:
            complete = False
        if complete:
            hasher.reset()
            hasher.update(target[0])
            hasher.update(target[1])
            complete = hasher.intdigest() == members.hashes.item(row)
        if not complete:
            self._read_again(part, members, row, target)

    def _read_again(self, part: OpenPart, members: Members, row: int, target: list[memoryview]) -> None:
        """The slow path of a read that failed, was short or does not hash right; raises `ShardError`."""
        shard = part.shard
        offset, problem = members.offsets.item(row), shard.error(row, "read", "not read", members)
        for attempt in range(_TRIES):
            self.retries += 1
            events.count("loader.read_retry", shard=shard.name, offset=offset, attempt=attempt + 1)
            try:
                fault.point("data.read_again")
                data = _read_fully(part.fd, offset - part.base, members.member_size)
            except OSError as error:
                problem = shard.error(row, "read", f"cannot be read: {error.strerror}", members)
                if error.errno not in _TRANSIENT:
                    break
                time.sleep(0.05 * 4**attempt)
                continue
            if len(data) != members.member_size:
                problem = shard.error(row, "length", f"ends after {len(data)} of {members.member_size} bytes", members)
                break
            if xxhash.xxh3_64_intdigest(data) == members.hashes.item(row):
                target[0][:] = data[: members.header_length]
                target[1][:] = data[members.header_length :]
                return
            # The same bytes twice: it is not the way to them that is at fault.
            problem = shard.error(row, "checksum", "its bytes do not have the xxh3-64 of the index", members)
            break
        raise problem

    def _check_contents(
        self,
        shards: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        buffer: RowBuffer,
        slot: int,
        bad: dict[int, ShardError],
        *,
        of_context: bool,
    ) -> None:
        """Add to `bad` the rows whose header is not the dataset's or whose numbers are not finite."""

        def known(place: int) -> tuple[OpenShard, Members, int]:
            shard = self._table.shard(int(shards[place]))
            return shard, shard.kinds[of_context], int(rows[place])

        count = len(shards)
        heads = buffer.heads[slot : slot + count]
        for place in np.flatnonzero((heads[:, : buffer.header_length] != buffer.expected).any(axis=1)).tolist():
            if place + slot not in bad:
                self._check_header(*known(place), buffer, place + slot, bad)
        for here in buffer.nonfinite_rows(slot, slot + count):
            if here not in bad:
                shard, members, row = known(here - slot)
                bad[here] = shard.error(row, "nonfinite", "holds NaN or infinity", members)

    def _check_header(
        self, shard: OpenShard, members: Members, row: int, buffer: RowBuffer, slot: int, bad: dict[int, ShardError]
    ) -> None:
        """Parse a header that is not byte for byte ours; another writer's padding is as good."""
        head = buffer.heads[slot, : members.header_length].tobytes()
        if (buffer.shape, head) in self._headers:
            return
        try:
            check_npy(head, members.member_size, buffer.shape, buffer.dtype)
        except DataError as error:
            bad[slot] = shard.error(row, "header", str(error), members)
        else:
            self._headers.add((buffer.shape, head))

    def close(self) -> None:
        """Close every file."""
        self._table.close()


def _pieces(members: Members, buffer: RowBuffer, slot: int) -> list[memoryview]:
    """Read target for a shard whose npy headers are longer or shorter than ours."""
    return [memoryview(cast(Any, buffer.heads[slot]))[: members.header_length], buffer.payload[slot]]


def _read_fully(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer only at the end of the file."""
    data = bytearray()
    while len(data) < size:
        piece = os.pread(fd, size - len(data), offset + len(data))
        if not piece:
            break
        data += piece
    return bytes(data)
