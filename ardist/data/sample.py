"""One sample of a shard: its key, its ``.npy`` member and its ``.json`` member.

A sample is two members of a tar, ``<key>.npy`` (the tensor) and ``<key>.json`` (where it came from); with text
embeddings three: ``<key>.context.npy``, float16 [K, D], besides. Nothing here unpickles: ``.npy`` headers are parsed
as literals and object arrays are refused.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from ardist.errors import DataError, InvalidValueError

SampleDtype = Literal["float16", "bfloat16", "uint8"]
"""Element types of stored samples; npy has no name for bfloat16, so its 16 bits stand in a ``<u2`` array."""

NUMPY_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "uint8": np.dtype("|u1"),
}
TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
CONTEXT_DTYPE: Final[SampleDtype] = "float16"
"""Of text embeddings, the optional second tensor of a sample."""

KEY: Final = re.compile(r"[0-9a-f]{16}")
MAX_CAPTION: Final = 8192

_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER: Final = 4096


class SampleInfo(BaseModel):
    """The ``.json`` member: the clip's source and span, and its labels. Unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    source: str
    start: float = Field(0, ge=0, allow_inf_nan=False, description="first frame or seconds, as the builder says")
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    frames: int = Field(ge=1)
    class_id: int | None = Field(None, ge=0, lt=2**31)
    caption: str | None = Field(None, max_length=MAX_CAPTION)

    def dump(self) -> bytes:
        """Canonical UTF-8 JSON: the same information gives the same bytes."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()


def sample_key(source_id: str, span: Sequence[float], parameters: Mapping[str, Any]) -> str:
    """16 hex digits that name a sample: a hash of its source, its span and how it was made."""
    text = json.dumps([source_id, list(span), dict(parameters)], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def key_to_int(key: str) -> int:
    """The key's 64 bits as an unsigned integer; `InvalidValueError` unless it is 16 lower-case hex digits."""
    if KEY.fullmatch(key) is None:
        raise InvalidValueError(f"sample key {key!r} is not 16 lower-case hexadecimal digits")
    return int(key, 16)


def key_from_int(bits: int) -> str:
    """The inverse of `key_to_int`; a negative `bits` is read as a signed 64-bit integer."""
    return f"{bits & 0xFFFF_FFFF_FFFF_FFFF:016x}"


@functools.lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...], dtype: SampleDtype) -> bytes:
    """The header of a C-ordered ``.npy`` of this shape, byte for byte what ``numpy.save`` writes."""
    shown = f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"
    text = f"{{'descr': '{NUMPY_DTYPES[dtype].str}', 'fortran_order': False, 'shape': {shown}, }}"
    # numpy reserves room for the first axis to grow to 21 digits, so that a file can be appended to in place.
    text += " " * (21 - len(str(shape[0])) if shape else 0)
    text += " " * (-(len(_MAGIC) + 4 + len(text) + 1) % 64) + "\n"
    return _MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


def npy_size(shape: tuple[int, ...], dtype: SampleDtype) -> int:
    """Bytes of a ``.npy`` member written by `encode_npy`."""
    return len(npy_header(shape, dtype)) + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize


def encode_npy(array: npt.NDArray[Any], dtype: SampleDtype) -> bytes:
    """The ``.npy`` bytes of a C-ordered copy of `array`; its dtype must already be the stored one."""
    if array.dtype != NUMPY_DTYPES[dtype]:
        raise InvalidValueError(
            f"array has dtype {array.dtype.str}, but {dtype} is stored as {NUMPY_DTYPES[dtype].str}"
        )
    return npy_header(array.shape, dtype) + np.ascontiguousarray(array).tobytes()


def parse_npy_header(data: bytes | memoryview) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, dtype, offset of the elements) of a ``.npy`` member that is a plain C-ordered array, else `DataError`.

    Object, structured, big-endian and Fortran-ordered arrays are refused; nothing is evaluated but a literal.
    """
    head = bytes(data[: _MAX_HEADER + 12])
    if head[: len(_MAGIC)] != _MAGIC or len(head) < 10:
        raise DataError(f"not an npy member: it starts with {head[:8]!r}")
    if head[6] == 1:
        length, start = struct.unpack_from("<H", head, 8)[0], 10
    elif head[6] in (2, 3) and len(head) >= 12:
        length, start = struct.unpack_from("<I", head, 8)[0], 12
    else:
        raise DataError(f"npy format version {head[6]}.{head[7]} is not known; legal: 1.0, 2.0, 3.0")
    if length > _MAX_HEADER or start + length > len(head):
        raise DataError(f"the npy header says it is {length} bytes long, which cannot be")
    try:
        fields = ast.literal_eval(head[start : start + length].decode("latin1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise DataError("the npy header is not a literal dictionary") from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise DataError("the npy header does not hold exactly descr, fortran_order and shape")
    shape, descr = fields["shape"], fields["descr"]
    if not isinstance(shape, tuple) or not all(type(axis) is int and axis >= 0 for axis in shape):
        raise DataError(f"the npy shape {shape!r} is not a tuple of sizes")
    legal = {dtype.str: dtype for dtype in NUMPY_DTYPES.values()}
    if not isinstance(descr, str) or descr not in legal:
        raise DataError(f"npy dtype {descr!r} is refused; legal: {', '.join(sorted(legal))}")
    if fields["fortran_order"] is not False and len(shape) > 1:
        raise DataError("the npy member is in Fortran order; samples are stored in C order")
    return shape, legal[descr], start + length


def decode_npy(data: bytes | memoryview, shape: tuple[int, ...], dtype: SampleDtype) -> npt.NDArray[Any]:
    """The array of a ``.npy`` member as a view; `DataError` unless it has exactly this shape, dtype and length."""
    offset = check_npy(data, len(data), shape, dtype)
    return np.frombuffer(data, NUMPY_DTYPES[dtype], math.prod(shape), offset).reshape(shape)


def check_npy(head: bytes | memoryview, size: int, shape: tuple[int, ...], dtype: SampleDtype) -> int:
    """Offset of the elements in a ``.npy`` member of `size` bytes that starts with `head`.

    Raises `DataError` unless the member has exactly this shape, dtype and length.
    """
    found_shape, found_dtype, offset = parse_npy_header(head)
    expected = NUMPY_DTYPES[dtype]
    if found_shape != tuple(shape) or found_dtype != expected:
        raise DataError(
            f"the npy member holds {found_dtype.str} {list(found_shape)}; the dataset {expected.str} {list(shape)}"
        )
    if offset + math.prod(shape) * expected.itemsize != size:
        raise DataError(
            f"the npy member is {size} bytes long, but its header needs {offset + math.prod(shape) * expected.itemsize}"
        )
    return offset
