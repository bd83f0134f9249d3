"""Writing one shard to a local folder: plain USTAR tar, index, content-derived names."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ardist.data.manifest import ShardEntry, Sums
from ardist.data.sample import CONTEXT_DTYPE, SampleDtype, SampleInfo, encode_npy, key_to_int
from ardist.data.tar_index import build_index, write_index
from ardist.errors import InvalidValueError


class Sample(NamedTuple):
    """What one sample of a shard holds; `array` has the stored dtype (bfloat16 as its 16 bits in ``<u2``).

    context: finite text embeddings, float16 [K, D], in every sample of a dataset or in none.
    """

    key: str
    array: npt.NDArray[Any]
    info: SampleInfo
    context: npt.NDArray[np.float16] | None = None


def write_shard(
    directory: str | os.PathLike[str],
    number: int,
    samples: Iterable[Sample],
    dtype: SampleDtype,
    *,
    with_sums: bool = True,
) -> ShardEntry:
    """Write ``shards/shard-<number>-<hash>.tar`` and ``.idx`` below a dataset folder; returns the manifest's entry.

    The tar is written to a temporary name, synced, read back to build the index (so that what is on disk is what was
    checked), and renamed last. The same samples give the same bytes. Raises `InvalidValueError` for no samples or
    mixed shapes, `ShardError` for a repeated key.
    """
    folder = Path(directory) / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".shard-{number:06d}.", suffix=".tar")
    try:
        with os.fdopen(handle, "wb") as file:
            shape, context_shape, sums = _write_members(file, samples, dtype, with_sums)
            file.flush()
            os.fsync(file.fileno())
        index = build_index(temporary, shape=shape, dtype=dtype, context=context_shape)
        name = f"shards/shard-{number:06d}-{index.tar_sha256[:8]}.tar"
        target = Path(directory) / name
        index_sha256 = write_index(target.with_suffix(".idx"), index.records, index.tar_size, index.tar_sha256)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return ShardEntry(
        name=name,
        n=len(index),
        bytes=index.tar_size,
        sha256=index.tar_sha256,
        index_sha256=index_sha256,
        shape=shape,
        dtype=dtype,
        context_shape=context_shape,
        sums=sums,
    )


def _write_members(
    file: Any, samples: Iterable[Sample], dtype: SampleDtype, with_sums: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None, Sums | None]:
    shape: tuple[int, ...] | None = None
    context_shape: tuple[int, ...] | None = None
    count, total, squares = 0, 0.0, 0.0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, array, info, context in samples:
            key_to_int(key)
            if shape is not None and array.shape != shape:
                raise InvalidValueError(
                    f"sample {key} has shape {list(array.shape)}, the shard began with {list(shape)}"
                )
            found = None if context is None else context.shape
            if shape is not None and found != context_shape:
                raise InvalidValueError(
                    f"sample {key} has context {_shown(found)}, the shard began with {_shown(context_shape)}"
                )
            shape, context_shape = array.shape, found
            for extension, data in _members(array, dtype, info, context):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            if with_sums:
                flat = real_values(array, dtype).reshape(-1, array.shape[-1]).astype(np.float64)
                count, total, squares = count + len(flat), total + flat.sum(0), squares + (flat * flat).sum(0)
    if shape is None:
        raise InvalidValueError("a shard needs at least one sample")
    if not with_sums:
        return shape, context_shape, None
    return shape, context_shape, Sums(count=count, total=tuple(np.ravel(total)), squares=tuple(np.ravel(squares)))


def _members(
    array: npt.NDArray[Any], dtype: SampleDtype, info: SampleInfo, context: npt.NDArray[np.float16] | None
) -> Iterator[tuple[str, bytes]]:
    """(extension, content) of a sample's members in their order."""
    yield "npy", encode_npy(array, dtype)
    if context is not None:
        yield "context.npy", encode_npy(context, CONTEXT_DTYPE)
    yield "json", info.dump()


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def real_values(array: npt.NDArray[Any], dtype: SampleDtype) -> npt.NDArray[Any]:
    """The stored numbers as numpy floats or integers; the 16 bits of a bfloat16 become a float32."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def file_sha256(path: Path) -> str:
    """sha256 of a whole file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
