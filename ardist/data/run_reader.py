"""Reads unbroken runs of a shard's rows with few system calls and puts each sample where its batch wants it.

A piece of a run is read as it lies in the file, verified while it is in the processor's cache, and only then written
to its rows of a window, which are anywhere in a much larger memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import xxhash

from ardist.data.open_shards import OpenPart, ShardTable
from ardist.data.window_arena import LARGEST_MEMBER, WindowRows, finite

_WIDEST: Final = LARGEST_MEMBER + 64 * 1024
"""Bytes from one member to the next up to which what lies between them is read along."""

_hash = xxhash.xxh3_64_intdigest


class RunReader:
    """Fills windows from open shards; safe to share between threads, each of which has a piece of memory of its own."""

    def __init__(self, table: ShardTable, num_classes: int) -> None:
        self._table, self._num_classes = table, num_classes
        self._local = threading.local()

    def read(self, number: int, first: int, last: int, memory: WindowRows, rows: npt.NDArray[np.int64]) -> None:
        """Read rows first..last of a shard into the rows `rows` of `memory` and mark those that are good there.

        Whatever is unusual (sizes, distances, a short read) is left unmarked. Raises `ShardError` and `OSError`.
        """
        begun = first
        while first <= last:
            part = self._table.part(number, first)
            stop = min(last + 1, part.last)
            members = part.shard.values
            if members.same_sizes and members.member_size == memory.member_size:
                offsets = members.offsets[first:stop].astype(np.int64) - part.base
                for low, high in pieces(offsets, memory.member_size, memory.at_once):
                    at = rows[first + low - begun : first + high - begun]
                    self._read_piece(part, first + low, offsets[low:high], memory, at)
            first = stop

    def _read_piece(
        self,
        part: OpenPart,
        first: int,
        offsets: npt.NDArray[np.int64],
        memory: WindowRows,
        rows: npt.NDArray[np.int64],
    ) -> None:
        """Members that have the same distance from each other, beginning with that of row `first`."""
        count, size, header = len(rows), memory.member_size, len(memory.header)
        stride = offsets.item(1) - offsets.item(0) if count > 1 else size
        length = (count - 1) * stride + size
        cache, view = self._memory(memory.at_once)
        if os.preadv(part.fd, [view[:length]], offsets.item(0)) != length:
            return
        chosen = slice(first, first + count)
        members, labels = part.shard.values, part.shard.class_ids[chosen]
        hashes = [_hash(view[at : at + size]) for at in range(0, length, stride)]
        whole: npt.NDArray[np.uint8] = np.ndarray((count, size), np.uint8, cache, 0, (stride, 1))
        good = np.array(hashes, np.uint64) == members.hashes[chosen]
        good &= (whole[:, :header] == memory.header).all(axis=1) & (labels < self._num_classes)
        if memory.dtype != "uint8":
            numbers = np.ndarray((count, (size - header) // 2), np.int16, cache, header, (stride, 2))
            good &= finite(numbers, memory.dtype)
        memory.raw[rows] = whole[:, header:]
        memory.keys[rows], memory.class_ids[rows] = part.shard.keys[chosen], labels
        memory.good[rows] = good

    def _memory(self, length: int) -> tuple[npt.NDArray[np.uint8], memoryview]:
        """This thread's piece of memory, at least `length` bytes."""
        held = getattr(self._local, "memory", None)
        if held is None or len(held[0]) < length:
            cache = np.empty(length, np.uint8)
            held = self._local.memory = cache, memoryview(cast(Any, cache))
        return cast(tuple[npt.NDArray[np.uint8], memoryview], held)


def pieces(offsets: npt.NDArray[np.int64], size: int, at_once: int) -> Iterator[tuple[int, int]]:
    """[low, high) of runs of members that have the same distance from each other and fit in `at_once` bytes."""
    low, count = 0, len(offsets)
    strides = np.diff(offsets)
    changes = [*(np.flatnonzero(np.diff(strides)) + 1).tolist(), count - 1]
    for change in changes:
        # The strides [low, change) are the same, and with them the members [low, change].
        while low <= change and low < count:
            stride = strides.item(low) if low < count - 1 else size
            most = 1 + (at_once - size) // stride if size <= stride <= _WIDEST else 1
            high = min(low + most, change + 1)
            yield low, high
            low = high
