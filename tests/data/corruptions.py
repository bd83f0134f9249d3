"""Damage of every kind to a dataset of 3 shards with 40 samples each, and what must come of it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from dataset_factory import key_of, latent, number_of

from ardist.data.loader import StreamingLoader
from ardist.data.manifest import Manifest, load_manifest, write_manifest
from ardist.data.tar_index import TarIndex, write_index

COUNTS = [40, 40, 40]

CONTENTS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("nonfinite", lambda data: data[:-2] + b"\x00\x7e"),
    ("nonfinite", lambda data: data[:-2] + b"\x00\x7c"),
    ("nonfinite", lambda data: data[:-2] + b"\x00\xfc"),
    ("header", lambda data: data.replace(b"<f2", b"<u2")),
    ("header", lambda data: data.replace(b"<f2", b">f2")),
    ("header", lambda data: data.replace(b"(2, 3, 4)", b"(2, 4, 3)")),
    ("header", lambda data: data.replace(b"False", b"True ")),
    ("header", lambda data: b"<html>" + data[6:]),
]
"""Reason, and what is done to a member whose checksums are made right again."""


def serve(loader: StreamingLoader, steps: int = 10) -> set[int]:
    """Take an epoch; every value must be exactly that of the sample whose id it carries."""
    seen = set()
    with loader:
        for _ in range(steps):
            batch = next(loader)
            for value, bits, label in zip(batch.values, batch.sample_ids.tolist(), batch.class_ids, strict=True):
                number = number_of(value)
                assert key_of(number) == f"{bits & (2**64 - 1):016x}"
                assert np.array_equal(value.numpy(), latent(number))
                assert label == number % 5
                seen.add(number)
    return seen


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def records(folder: Path, shard: int) -> np.ndarray:
    manifest = load_manifest(folder)
    return np.array(TarIndex.open((folder / manifest.shards[shard].index_name).read_bytes()).records)


def seal(folder: Path, manifest: Manifest, shard: int, **changes: dict[int, int]) -> None:
    """Make index and manifest agree with a tar that was edited, as a faulty builder would."""
    entry = manifest.shards[shard]
    rows = records(folder, shard)
    tar = (folder / entry.name).read_bytes()
    for row in range(len(rows)):
        offset, size = int(rows["offset"][row]), int(rows["size"][row])
        rows["hash"][row] = xxhash.xxh3_64_intdigest(tar[offset : offset + size])
    for column, values in changes.items():
        for row, value in values.items():
            rows[column][row] = value
    sha256 = hashlib.sha256(tar).hexdigest()
    index_sha256 = write_index(folder / entry.index_name, rows, len(tar), sha256)
    shards = list(manifest.shards)
    shards[shard] = entry.model_copy(update={"sha256": sha256, "index_sha256": index_sha256})
    write_manifest(folder, manifest.model_copy(update={"shards": tuple(shards)}))


def flip_payload(folder: Path, manifest: Manifest, rng: random.Random) -> tuple[int, int]:
    """Flip one bit of one sample's member; returns its shard and row."""
    shard, row = rng.randrange(3), rng.randrange(40)
    record = records(folder, shard)[row]
    path = folder / manifest.shards[shard].name
    place = int(record["offset"]) + rng.randrange(int(record["size"]))
    patch(path, place, bytes([path.read_bytes()[place] ^ 1 << rng.randrange(8)]))
    return shard, row


def edit_member(
    folder: Path, manifest: Manifest, rng: random.Random, edit: Callable[[bytes], bytes]
) -> tuple[int, int]:
    """Edit one sample's member and make index and manifest agree; returns its shard and row."""
    shard, row = rng.randrange(3), rng.randrange(40)
    record = records(folder, shard)[row]
    path = folder / manifest.shards[shard].name
    first, last = int(record["offset"]), int(record["offset"] + record["size"])
    patch(path, first, edit(path.read_bytes()[first:last]))
    seal(folder, manifest, shard)
    return shard, row


def flip_index(folder: Path, manifest: Manifest, rng: random.Random) -> None:
    """Flip one bit of one shard's index."""
    path = folder / manifest.shards[rng.randrange(3)].index_name
    data = path.read_bytes()
    place = rng.randrange(len(data))
    patch(path, place, bytes([data[place] ^ 1 << rng.randrange(8)]))


def check_one_bad(
    loader: StreamingLoader, manifest: Manifest, shard: int, row: int, reason: str, index: np.ndarray
) -> None:
    """The loader serves the epoch without this sample and names it, with its shard and offset."""
    bad = shard * 40 + row
    # What stands in its place is of the same epoch too.
    assert serve(loader) == set(range(120)) - {bad}
    (event,) = loader.substitutions
    name, offset = manifest.shards[shard].name, int(index["offset"][row])
    assert (event.shard, event.offset, event.sample, event.reason) == (name, offset, key_of(bad), reason)
    assert loader.metrics()[f"substitutions_{reason}"] == 1


def named(folder: Path, shard: int, row: int) -> str:
    """A pattern for what an error says about a sample."""
    offset = int(records(folder, shard)["offset"][row])
    return f"{load_manifest(folder).shards[shard].name} at byte {offset} .sample {key_of(shard * 40 + row)}"


RESIZED: dict[str, Callable[[Path, random.Random], None]] = {
    "cut at a sample": lambda path, rng: truncate(path, rng.randrange(1, 40) * 2048),
    "cut inside a sample": lambda path, rng: truncate(path, rng.randrange(1, 40) * 2048 + rng.randrange(1, 600)),
    "without end blocks": lambda path, rng: truncate(path, 40 * 2048),
    "zero bytes": lambda path, rng: truncate(path, 0),
    "html": lambda path, rng: replace_with(path, b"<html>503 Slow Down</html>"),
    "appended": lambda path, rng: replace_with(path, path.read_bytes() + b"x" * rng.randrange(1, 5000)),
    "missing": lambda path, rng: path.unlink(),
}


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def replace_with(path: Path, data: bytes) -> None:
    path.write_bytes(data)
