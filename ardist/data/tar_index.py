"""The binary index of a shard (``.idx``): where each sample lies in the tar, and its hash.

Little-endian, without padding, 64 + 32 n bytes, meant to be memory-mapped:

=========  =========================================================================================
header     magic ``ARDIDX\\r\\n`` | version u32 | record bytes u32 | n u64 | tar bytes u64 | tar sha256
record     offset u64 | size u32 | class id i32 (-1: none) | xxh3-64 u64 | key u64
=========  =========================================================================================

Offset, size and hash are those of the ``<key>.npy`` member's content (npy header included). The class id stands in
the record so that a batch never has to read a sample's json.

A dataset with text embeddings has version 2, with 64 + 56 n bytes: the same record, followed by those of the
``<key>.context.npy`` member: offset u64 | size u32 | 0 u32 | xxh3-64 u64.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ValidationError

from ardist.data.errors import ShardError
from ardist.data.sample import CONTEXT_DTYPE, SampleDtype, SampleInfo, check_npy, decode_npy, key_from_int
from ardist.errors import DataError

MAGIC: Final = b"ARDIDX\r\n"
HEADER: Final = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("record", "<u4"), ("n", "<u8"), ("tar_size", "<u8"), ("sha256", "u1", 32)]
)
_FIELDS: Final = [("offset", "<u8"), ("size", "<u4"), ("class_id", "<i4"), ("hash", "<u8"), ("key", "<u8")]
_CONTEXT: Final = [("context_offset", "<u8"), ("context_size", "<u4"), ("zero", "<u4"), ("context_hash", "<u8")]
RECORD: Final = np.dtype(_FIELDS)
CONTEXT_RECORD: Final = np.dtype(_FIELDS + _CONTEXT)
VERSIONS: Final = {1: RECORD, 2: CONTEXT_RECORD}
_HEAD: Final = struct.Struct("<8sIIQQ32s")
"""The fields of `HEADER`; taking a header apart with numpy costs as much as checking a hundred records."""
_MEMBER: Final = re.compile(r"([0-9a-f]{16})\.(npy|json|context\.npy)")
_MAX_JSON: Final = 2**20

Records = npt.NDArray[Any]
"""One-dimensional array of dtype `RECORD` or `CONTEXT_RECORD`."""


@dataclass(frozen=True)
class TarIndex:
    """The records of one shard and what they belong to; `records` is read-only and may be a memory map."""

    records: Records
    tar_size: int
    tar_sha256: str

    def __len__(self) -> int:
        return len(self.records)

    def to_bytes(self) -> bytes:
        """The ``.idx`` file."""
        header = np.zeros((), HEADER)
        version = next(number for number, dtype in VERSIONS.items() if dtype == self.records.dtype)
        header["magic"], header["version"], header["record"] = MAGIC, version, self.records.dtype.itemsize
        header["n"], header["tar_size"] = len(self.records), self.tar_size
        header["sha256"] = np.frombuffer(bytes.fromhex(self.tar_sha256), np.uint8)
        return header.tobytes() + np.ascontiguousarray(self.records).tobytes()

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] | bytes | memoryview,
        *,
        name: str = "",
        tar_size: int | None = None,
        tar_sha256: str | None = None,
        n: int | None = None,
    ) -> TarIndex:
        """Memory-map an index file, or take its bytes, and check it against what the manifest says.

        `name` is the shard's name for messages. Raises `ShardError` (reason ``index`` or ``missing``).
        """
        shown = name or (str(source) if isinstance(source, str | os.PathLike) else "index")
        try:
            data = _map(Path(source)) if isinstance(source, str | os.PathLike) else np.frombuffer(source, np.uint8)
        except OSError as error:
            raise ShardError(shown, "missing", f"its index cannot be read: {error.strerror}") from None
        if len(data) < HEADER.itemsize:
            raise ShardError(shown, "index", f"its index is {len(data)} bytes long, shorter than a header")
        magic, version, record_bytes, count, size, digest = _HEAD.unpack(data[: HEADER.itemsize].tobytes())
        if magic != MAGIC:
            raise ShardError(shown, "index", f"its index starts with {magic!r}, not {MAGIC!r}")
        record = VERSIONS.get(version)
        if record is None or record_bytes != record.itemsize:
            known = " or ".join(f"{number} with {dtype.itemsize}-byte records" for number, dtype in VERSIONS.items())
            raise ShardError(
                shown,
                "index",
                f"its index has version {version} with {record_bytes}-byte records; this program reads version {known}",
            )
        if len(data) != HEADER.itemsize + count * record.itemsize:
            raise ShardError(shown, "index", f"its index names {count} samples but is {len(data)} bytes long")
        index = cls(data[HEADER.itemsize :].view(record), size, digest.hex())
        for what, found, expected in (
            ("samples", count, n),
            ("tar bytes", index.tar_size, tar_size),
            ("tar sha256", index.tar_sha256, tar_sha256),
        ):
            if expected is not None and found != expected:
                raise ShardError(
                    shown, "index", f"its index belongs to another tar: {what} {found}, the manifest says {expected}"
                )
        _check_spans(index, shown)
        return index


def _map(path: Path) -> npt.NDArray[np.uint8]:
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def _check_spans(index: TarIndex, name: str) -> None:
    records = index.records
    # Dense columns: what numpy does with numbers that stand apart, or of two sizes, takes several times as long.
    start = np.ascontiguousarray(records["offset"])
    end = start + records["size"].astype(np.uint64)
    wrong = (start < 512) | (end > index.tar_size) | (end < start) | (records["class_id"] < -1)
    wrong[1:] |= start[1:] < end[:-1]
    if records.dtype == CONTEXT_RECORD:
        first = np.ascontiguousarray(records["context_offset"])
        last = first + records["context_size"].astype(np.uint64)
        wrong |= (first < 512) | (last > index.tar_size) | (last < first) | ((first < end) & (start < last))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ShardError(name, "index", f"record {at} of its index points outside the tar or into another sample")


def write_index(path: str | os.PathLike[str], records: Records, tar_size: int, tar_sha256: str) -> str:
    """Write an index file atomically (temporary file, fsync, rename); returns its sha256."""
    data = TarIndex(records, tar_size, tar_sha256).to_bytes()
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return hashlib.sha256(data).hexdigest()


def build_index(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    name: str = "",
    shape: tuple[int, ...] | None = None,
    dtype: SampleDtype | None = None,
    context: tuple[int, ...] | None = None,
) -> TarIndex:
    """Index a tar of ours (a path or an open file) by reading all of it; refuses whatever a trainer must not meet.

    Checked: regular members only, names ``<16 hex>.npy|json``, the members of a sample side by side, no key twice,
    with `context` also ``<16 hex>.context.npy``, finite float16 of that shape, in every sample and otherwise in none,
    the npy header (against `shape` and `dtype` when given), the json's fields, and that the tar ends as a tar ends
    (zero blocks and nothing after them), so that a tar cut between two samples is noticed. Raises `ShardError`, which
    calls the shard `name`.
    """
    if not isinstance(source, str | os.PathLike):
        return _build(source, name or "shard", shape, dtype, context)
    shown = name or Path(source).name
    try:
        with Path(source).open("rb") as raw:
            return _build(raw, shown, shape, dtype, context)
    except OSError as error:
        raise ShardError(shown, "missing", f"cannot be read: {error.strerror or error}") from None


def _build(
    raw: BinaryIO,
    name: str,
    shape: tuple[int, ...] | None,
    dtype: SampleDtype | None,
    context: tuple[int, ...] | None,
) -> TarIndex:
    rows: list[tuple[int, ...]] = []
    kinds = ("npy", "json") if context is None else ("npy", "json", "context.npy")
    seen: set[str] = set()
    pending: dict[str, tarfile.TarInfo] = {}
    pending_key, end = "", 0
    raw.seek(0)
    size = os.fstat(raw.fileno()).st_size
    sha256 = hashlib.file_digest(raw, "sha256").hexdigest()  # type: ignore[arg-type]
    raw.seek(0)
    try:
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                key, kind = _member_name(member, name, kinds)
                if pending and key != pending_key:
                    raise _incomplete(name, pending_key, pending, kinds)
                if key in seen or kind in pending:
                    raise ShardError(name, "order", f"{member.name} stands in the tar twice", member.offset, key)
                pending_key, pending[kind] = key, member
                end = member.offset_data + (member.size + 511) // 512 * 512
                if len(pending) == len(kinds):
                    rows.append(
                        _record(raw, name, key, pending, shape, dtype) + _context(raw, name, key, pending, context)
                    )
                    seen.add(key)
                    pending = {}
    except tarfile.TarError as error:
        cut = size == 0 or "unexpected end" in str(error)
        raise ShardError(name, "length" if cut else "member", f"not a readable tar: {error}") from None
    if pending:
        raise _incomplete(name, pending_key, pending, kinds)
    check_tail(raw, name, end, size)
    return TarIndex(np.array(rows, RECORD if context is None else CONTEXT_RECORD), size, sha256)


def _member_name(member: tarfile.TarInfo, shard: str, kinds: tuple[str, ...]) -> tuple[str, str]:
    match = _MEMBER.fullmatch(member.name)
    if not member.isreg():
        raise ShardError(shard, "member", f"{member.name!r} is not a regular file", member.offset)
    if match is None or match[2] not in kinds:
        legal = " or .".join(kinds)
        raise ShardError(shard, "name", f"{member.name!r} is not <16 hex digits>.{legal}", member.offset)
    return match[1], match[2]


def _incomplete(shard: str, key: str, members: dict[str, tarfile.TarInfo], kinds: tuple[str, ...]) -> ShardError:
    there = next(iter(members.values()))
    missing = next(kind for kind in reversed(kinds) if kind not in members)
    return ShardError(shard, "order", f"{there.name} has no {key}.{missing} beside it", there.offset, key)


def _record(
    raw: BinaryIO,
    shard: str,
    key: str,
    members: dict[str, tarfile.TarInfo],
    shape: tuple[int, ...] | None,
    dtype: SampleDtype | None,
) -> tuple[int, int, int, int, int]:
    array, info = members["npy"], members["json"]
    if info.size > _MAX_JSON:
        raise ShardError(shard, "member", f"its json is {info.size} bytes long", info.offset, key)
    data, text = _read(raw, shard, array), _read(raw, shard, info)
    try:
        if shape is not None and dtype is not None:
            check_npy(data, len(data), shape, dtype)
        label = SampleInfo.model_validate_json(text).class_id
    except ValidationError as error:
        detail = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ShardError(shard, "member", f"its json is refused: {detail}", info.offset_data, key) from None
    except DataError as error:
        raise ShardError(shard, "header", str(error), array.offset_data, key) from None
    return (array.offset_data, len(data), -1 if label is None else label, xxhash.xxh3_64_intdigest(data), int(key, 16))


def _context(
    raw: BinaryIO, shard: str, key: str, members: dict[str, tarfile.TarInfo], shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The columns of the second member, none where the dataset has none."""
    if shape is None:
        return ()
    member = members["context.npy"]
    data = _read(raw, shard, member)
    try:
        values = decode_npy(data, shape, CONTEXT_DTYPE)
    except DataError as error:
        raise ShardError(shard, "header", f"its context: {error}", member.offset_data, key) from None
    if not np.isfinite(values).all():
        raise ShardError(shard, "nonfinite", "its context holds NaN or infinity", member.offset_data, key)
    return (member.offset_data, len(data), 0, xxhash.xxh3_64_intdigest(data))


def _read(raw: BinaryIO, shard: str, member: tarfile.TarInfo) -> bytes:
    raw.seek(member.offset_data)
    data = raw.read(member.size)
    if len(data) != member.size:
        raise ShardError(
            shard, "length", f"{member.name} is cut after {len(data)} of {member.size} bytes", member.offset_data
        )
    return data


def check_tail(raw: BinaryIO, shard: str, end: int, size: int) -> None:
    """Refuse a tar that does not end after byte `end` with zero blocks and nothing else; raises `ShardError`."""
    raw.seek(end)
    tail = raw.read(size - end) if size > end else b""
    if len(tail) < 1024 or tail.count(0) != len(tail):
        raise ShardError(
            shard, "length", "the tar does not end with zero blocks: cut between two samples, or something follows", end
        )


def find_key(index: TarIndex, bits: int) -> int:
    """Row of the sample whose key has these 64 bits; `ShardError` when the shard does not hold it."""
    rows = np.flatnonzero(index.records["key"] == np.uint64(bits & 0xFFFF_FFFF_FFFF_FFFF))
    if not len(rows):
        raise ShardError("shard", "member", f"no sample {key_from_int(bits)}")
    return int(rows[0])
