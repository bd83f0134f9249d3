"""WebDataset tars that others wrote: read them as they are, or index them and train from them in place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import xxhash
from webdataset import WebDataset
from webdataset.tariterators import base_plus_ext

from ardist.data.errors import ManifestError, ShardError
from ardist.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, Sums, VAEIdentity, fold_shards
from ardist.data.sample import NUMPY_DTYPES, SampleDtype, decode_npy, parse_npy_header
from ardist.data.shard_writer import real_values
from ardist.data.tar_index import RECORD, Records, TarIndex, check_tail
from ardist.errors import DataError
from ardist.storage import ObjectInfo, Storage, open_storage

_MAX_TEXT: Final = 2**20
_STORED: Final[Mapping[tuple[str, str], SampleDtype]] = {
    ("latents", "<f2"): "float16",
    ("latents", "<u2"): "bfloat16",
    ("pixels", "|u1"): "uint8",
}


def safe_decode(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Decode what needs no code to be decoded: npy, json, cls (an integer) and txt; other members stay bytes.

    The library's own decoder would unpickle ``.pyd`` and ``.pth`` members and object arrays. Raises `DataError`.
    """
    result: dict[str, Any] = {}
    for name, value in sample.items():
        extension = name.rsplit(".", 1)[-1].lower()
        if not isinstance(value, bytes) or name.startswith("__"):
            result[name] = value
            continue
        try:
            if extension == "npy":
                shape, dtype, offset = parse_npy_header(value)
                result[name] = np.frombuffer(value, dtype, offset=offset).reshape(shape)
            elif extension == "json":
                result[name] = json.loads(value[:_MAX_TEXT])
            elif extension == "cls":
                result[name] = int(value[:32])
            elif extension == "txt":
                result[name] = value[:_MAX_TEXT].decode()
            else:
                result[name] = value
        except (ValueError, DataError, RecursionError) as error:
            raise DataError(f"{sample.get('__url__')}: {sample.get('__key__')}.{name}: {error}") from None
    return result


def foreign_samples(urls: str) -> Iterator[dict[str, Any]]:
    """The samples of plain WebDataset tars (brace patterns allowed) in order, with `safe_decode`.

    For looking into a dataset: the library does not notice tars that were cut, nor flipped bits.
    """
    return iter(WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=None).map(safe_decode))


def index_foreign(
    folder: str | Path,
    *,
    kind: Literal["latents", "pixels"],
    vae: VAEIdentity | None = None,
    classes: tuple[str, ...] | None = None,
    array: str = "npy",
    label: str = "cls",
    dataset_id: str | None = None,
) -> Manifest:
    """Index every ``*.tar`` of a folder or ``s3://`` prefix and write ``.idx`` files and ``manifest.json`` beside them.

    Members are grouped as the library groups them: the key is the name up to the first dot. `array` and `label` are
    the extensions of the tensor (one shape and dtype throughout: float16 or bfloat16 bits for latents, uint8 for
    pixels) and of the class number, if there is one. Afterwards the folder is a dataset like any other. Raises
    `ShardError` for a damaged tar, `ManifestError` where the samples do not make a dataset.
    """
    storage = open_storage(os.fspath(folder))
    tars = [info for info in storage.walk() if info.name.endswith(".tar")]
    if not tars:
        raise ManifestError(f"{storage.url} holds no tar")
    entries, highest = [], -1
    for info in tars:
        with _on_this_machine(storage, info) as path:
            entry, records = _index_tar(path, info.name, kind, array, label)
        # Last, like the manifest: what is there has been read to its end.
        storage.put(entry.index_name, TarIndex(records, entry.bytes, entry.sha256).to_bytes())
        entries.append(entry)
        highest = max(highest, int(records["class_id"].max()))
    if classes is None and highest >= 0:
        classes = tuple(str(number) for number in range(highest + 1))
    manifest = fold_shards(
        entries,
        dataset_id=dataset_id or storage.url.rstrip("/").rsplit("/", 1)[-1],
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        code_version=version("ardist"),
        kind=kind,
        vae=vae,
        classes=classes,
        tools={"webdataset": version("webdataset")},
        preprocessing={"foreign": {"array": array, "label": label}},
    )
    storage.put(MANIFEST_NAME, manifest.dump())
    return manifest


@contextlib.contextmanager
def _on_this_machine(storage: Storage, info: ObjectInfo) -> Iterator[Path]:
    """A tar as a file: itself, or one version of a remote object as a temporary copy."""
    path = storage.local_path(info.name)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ardist-foreign-") as folder:
        copy = Path(folder) / "shard.tar"
        storage.download(info.name, copy, info.version)
        yield copy


def _index_tar(path: Path, name: str, kind: str, array: str, label: str) -> tuple[ShardEntry, Records]:
    rows: dict[str, tuple[int, int, int, int]] = {}
    labels: dict[str, int] = {}
    shape: tuple[int, ...] | None = None
    dtype: SampleDtype | None = None
    sums: list[Sums] = []
    with path.open("rb") as raw:
        size, end = path.stat().st_size, 0
        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
        raw.seek(0)
        try:
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + (member.size + 511) // 512 * 512
                    key, extension = base_plus_ext(member.name)
                    if key is None or extension.lower() not in (array, label) or not member.isreg():
                        continue
                    data = _content(raw, name, member)
                    if extension.lower() == label:
                        labels[key] = _class_number(data, name, member)
                        continue
                    if key in rows:
                        raise ShardError(name, "order", f"{member.name} stands in the tar twice", member.offset)
                    shape, dtype = _same_layout(data, name, member, kind, shape, dtype)
                    if dtype != "uint8":
                        sums.append(Sums.of(real_values(decode_npy(data, shape, dtype), dtype)))
                    number = int(hashlib.sha256(f"{name}/{key}".encode("utf-8", "surrogatepass")).hexdigest()[:16], 16)
                    rows[key] = member.offset_data, len(data), xxhash.xxh3_64_intdigest(data), number
        except tarfile.TarError as error:
            raise ShardError(name, "member", f"not a readable tar: {error}") from None
        check_tail(raw, name, end, size)
    if shape is None or dtype is None:
        raise ShardError(name, "member", f"holds no .{array} member")
    records = np.array(
        [(offset, count, labels.get(key, -1), digest, number) for key, (offset, count, digest, number) in rows.items()],
        RECORD,
    )
    index_sha256 = hashlib.sha256(TarIndex(records, size, sha256).to_bytes()).hexdigest()
    entry = ShardEntry(
        name=name,
        n=len(records),
        bytes=size,
        sha256=sha256,
        index_sha256=index_sha256,
        shape=shape,
        dtype=dtype,
        sums=_added(sums),
    )
    return entry, records


def _content(raw: BinaryIO, name: str, member: tarfile.TarInfo) -> bytes:
    raw.seek(member.offset_data)
    data = raw.read(member.size)
    if len(data) != member.size:
        raise ShardError(name, "length", f"{member.name} is cut after {len(data)} bytes", member.offset_data)
    return data


def _class_number(data: bytes, name: str, member: tarfile.TarInfo) -> int:
    try:
        number = int(data[:32])
    except ValueError:
        number = -1
    if not 0 <= number < 2**31:
        raise ShardError(name, "label", f"{member.name} is not a class number", member.offset_data)
    return number


def _same_layout(
    data: bytes,
    name: str,
    member: tarfile.TarInfo,
    kind: str,
    shape: tuple[int, ...] | None,
    dtype: SampleDtype | None,
) -> tuple[tuple[int, ...], SampleDtype]:
    """Shape and dtype of an array member; it must have those of the members before it."""
    try:
        found_shape, found_dtype, offset = parse_npy_header(data)
        stored = _STORED.get((kind, found_dtype.str))
        if stored is None:
            raise DataError(f"{found_dtype.str} cannot be {kind}")
        if len(data) - offset != int(np.prod(found_shape)) * NUMPY_DTYPES[stored].itemsize:
            raise DataError("its length does not fit its header")
        if shape is not None and (found_shape, stored) != (shape, dtype):
            raise DataError(f"it holds {stored} {list(found_shape)}, those before it {dtype} {list(shape)}")
    except DataError as error:
        raise ShardError(name, "header", f"{member.name}: {error}", member.offset_data) from None
    return found_shape, stored


def _added(sums: list[Sums]) -> Sums | None:
    if not sums:
        return None
    return Sums(
        count=sum(part.count for part in sums),
        total=tuple(np.sum([part.total for part in sums], axis=0).tolist()),
        squares=tuple(np.sum([part.squares for part in sums], axis=0).tolist()),
    )
