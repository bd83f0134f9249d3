"""What a loader hands out, and the reused memory behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from ardist.data.sample import CONTEXT_DTYPE, NUMPY_DTYPES, TORCH_DTYPES, SampleDtype, npy_header

HEADER_ROOM: Final = 512
"""Bytes kept for the npy header of a row; the longest that is read."""


Layout: TypeAlias = tuple[tuple[int, ...], SampleDtype, tuple[int, ...] | None]
"""What decides which samples may stand in one buffer: shape, dtype, and the context's shape."""


_OBJECTS_PER_ROW: Final = 1024
"""Bytes of the Python objects that stand for a row: views of its header and of its values."""

_PIECE: Final = 64 * 1024
"""Numbers that are looked at at once; twice as many bytes fit in any second-level cache."""


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one optimiser step.

    values: [m, F, L, C] latents or [m, F, H, W, 3] pixels in the stored dtype, in a reused (pinned where CUDA is
    there) buffer: valid until the next batch is asked for. sample_ids: int64 [m], the 64 bits of the keys.
    class_ids: int64 [m], -1 where a sample has no label, or None for a dataset without classes.
    context: text embeddings float16 [m, K, D], in reused memory too, or None for a dataset without them.
    """

    values: torch.Tensor
    sample_ids: torch.Tensor
    epoch: int
    class_ids: torch.Tensor | None = None
    context: torch.Tensor | None = None


class Rows(NamedTuple):
    """Some samples in memory that belongs to somebody else.

    values: [m, …] in the stored dtype. keys: uint64 [m]. class_ids: int64 [m]. context: [m, K, D] or None.
    """

    values: torch.Tensor
    keys: npt.NDArray[np.uint64]
    class_ids: npt.NDArray[np.int64]
    context: torch.Tensor | None


@dataclass
class RowBuffer:
    """Memory for m samples of one shape: npy headers and values apart, so that the values are one dense tensor."""

    rows: int
    shape: tuple[int, ...]
    dtype: SampleDtype
    pinned: bool = False
    context_shape: tuple[int, ...] | None = None
    context: RowBuffer | None = field(init=False)
    """Rows of the samples' second member, where they have one."""
    values: torch.Tensor = field(init=False)
    heads: npt.NDArray[np.uint8] = field(init=False)
    keys: npt.NDArray[np.uint64] = field(init=False)
    class_ids: npt.NDArray[np.int64] = field(init=False)
    targets: list[list[memoryview]] = field(init=False)
    """Per row the two pieces that one read fills: header and values."""

    def __post_init__(self) -> None:
        count = math.prod(self.shape)
        self.values = torch.empty((self.rows, *self.shape), dtype=TORCH_DTYPES[self.dtype], pin_memory=self.pinned)
        self.raw = self.values.view(self.rows, count).view(torch.uint8)
        raw = self.raw.numpy()
        # Touch the pages now: the first write to fresh memory is ten times slower than later ones.
        raw.fill(0)
        self.bits = raw.view(NUMPY_DTYPES["bfloat16" if self.dtype != "uint8" else "uint8"])
        self.expected = np.frombuffer(npy_header(self.shape, self.dtype), np.uint8)
        self.header_length = len(self.expected)
        self.heads = np.zeros((self.rows, HEADER_ROOM), np.uint8)
        self.keys = np.zeros(self.rows, np.uint64)
        self.class_ids = np.zeros(self.rows, np.int64)
        self.payload = [memoryview(cast(Any, raw[row])) for row in range(self.rows)]
        heads = [memoryview(cast(Any, row))[: self.header_length] for row in self.heads]
        self.targets = [[head, values] for head, values in zip(heads, self.payload, strict=True)]
        self._pieces_per_row = _pieces_per_row(count)
        self._pieces = self.bits.reshape(self.rows * self._pieces_per_row, -1)
        scratch = np.empty_like(self._pieces[: max(1, _PIECE * 2 // self._pieces.shape[1])])
        self._scratch = scratch if self.dtype != "uint8" else None
        shape = self.context_shape
        self.context = None if shape is None else RowBuffer(self.rows, shape, CONTEXT_DTYPE, self.pinned)

    def all_rows(self) -> Rows:
        """What it holds, in this memory."""
        context = None if self.context is None else self.context.values
        return Rows(self.values, self.keys, self.class_ids, context)

    @staticmethod
    def bytes_for(
        rows: int, shape: tuple[int, ...], dtype: SampleDtype, context_shape: tuple[int, ...] | None = None
    ) -> int:
        """Memory that one buffer takes."""
        context = 0 if context_shape is None else RowBuffer.bytes_for(rows, context_shape, CONTEXT_DTYPE)
        return rows * (math.prod(shape) * NUMPY_DTYPES[dtype].itemsize + HEADER_ROOM + _OBJECTS_PER_ROW + 16) + context

    def nonfinite_rows(self, first: int, last: int) -> list[int]:
        """Which of the rows [first, last) hold an infinity or NaN: an exponent of all ones."""
        if self._scratch is None:
            return []
        mask = np.uint16(0x7C00 if self.dtype == "float16" else 0x7F80)
        found: list[int] = []
        at_once, per_row = len(self._scratch), self._pieces_per_row
        for low in range(first * per_row, last * per_row, at_once):
            # A little at a time stays in the cache and needs no second buffer of the batch's size.
            pieces = self._pieces[low : min(low + at_once, last * per_row)]
            masked = np.bitwise_and(pieces, mask, out=self._scratch[: len(pieces)])
            found += ((low + np.flatnonzero(masked.max(axis=1) == mask)) // per_row).tolist()
        return sorted(set(found))


class BlockMemory:
    """Memory for those steps of a block whose rows do not lie in memory already; each step's is made when first needed.

    Belongs to one block at a time and is reused by the next.
    """

    def __init__(self, rows: Mapping[Layout, int], *, pinned: bool) -> None:
        self._rows, self._pinned = rows, pinned
        self._made: dict[tuple[int, Layout], RowBuffer] = {}

    def of(self, step: int, layout: Layout) -> RowBuffer:
        """For the batch of the block's step number `step`, whose samples have this layout."""
        buffer = self._made.get((step, layout))
        if buffer is None:
            shape, dtype, context = layout
            buffer = RowBuffer(self._rows[layout], shape, dtype, self._pinned, context)
            self._made[step, layout] = buffer
        return buffer


def _pieces_per_row(count: int) -> int:
    """Into how many equal pieces of at most `_PIECE` numbers a row can be cut; 1 where it does not come out even."""
    least = -(-count // _PIECE)
    return next((pieces for pieces in range(least, least + 64) if count % pieces == 0), 1)
