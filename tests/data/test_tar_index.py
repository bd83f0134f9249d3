"""The index: its bytes, what it refuses, and that plain tar readers open our shards."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from dataset_factory import key_of, latent, make_dataset

from ardist.data.errors import ShardError
from ardist.data.manifest import Manifest
from ardist.data.sample import SampleInfo, encode_npy
from ardist.data.tar_index import HEADER, RECORD, TarIndex, build_index, write_index

SHAPE = (2, 3, 4)


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, make_dataset(tmp_path, [6, 2])


def test_layout_is_the_documented_one(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    assert (HEADER.itemsize, RECORD.itemsize) == (64, 32)
    tar = (folder / manifest.shards[0].name).read_bytes()
    data = (folder / manifest.shards[0].index_name).read_bytes()
    assert data[:8] == b"ARDIDX\r\n"
    assert [int.from_bytes(data[a:b], "little") for a, b in [(8, 12), (12, 16), (16, 24), (24, 32)]] == [
        1,
        32,
        6,
        len(tar),
    ]
    assert data[32:64].hex() == hashlib.sha256(tar).hexdigest() == manifest.shards[0].sha256
    for number in range(6):
        record = data[64 + 32 * number : 96 + 32 * number]
        offset, size = int.from_bytes(record[:8], "little"), int.from_bytes(record[8:12], "little")
        member = tar[offset : offset + size]
        assert member == encode_npy(latent(number), "float16")
        assert int.from_bytes(record[12:16], "little", signed=True) == number % 5
        assert int.from_bytes(record[16:24], "little") == xxhash.xxh3_64_intdigest(member)
        assert f"{int.from_bytes(record[24:], 'little'):016x}" == key_of(number)


def test_other_readers_open_our_shards(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    path = folder / manifest.shards[0].name
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [key_of(number) for number in range(6)]
    for number, sample in enumerate(samples):
        assert np.array_equal(np.load(io.BytesIO(sample["npy"]), allow_pickle=False), latent(number))
        assert SampleInfo.model_validate_json(sample["json"]).class_id == number % 5
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 12
        assert {member.mtime for member in tar} == {0}


def test_building_an_index_gives_the_written_one(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    entry = manifest.shards[1]
    built = build_index(folder / entry.name, shape=SHAPE, dtype="float16")
    stored = TarIndex.open(folder / entry.index_name, n=2, tar_size=entry.bytes, tar_sha256=entry.sha256)
    assert np.array_equal(built.records, stored.records)
    digest = write_index(folder / "copy.idx", built.records, built.tar_size, built.tar_sha256)
    assert digest == entry.index_sha256 == hashlib.sha256((folder / "copy.idx").read_bytes()).hexdigest()


def test_same_samples_give_the_same_names(tmp_path: Path) -> None:
    first, second = make_dataset(tmp_path / "a", [4]), make_dataset(tmp_path / "b", [4])
    assert first.digest() == second.digest()
    assert first.shards[0].name == f"shards/shard-000000-{first.shards[0].sha256[:8]}.tar"
    assert sorted(path.name for path in (tmp_path / "a" / "shards").iterdir()) == sorted(
        [Path(first.shards[0].name).name, Path(first.shards[0].index_name).name]
    )


def edited(position: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + value + data[position + len(value) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "shorter than a header"),
        (lambda data: data[:40], "shorter than a header"),
        (lambda data: data[:-1], "names 6 samples"),
        (lambda data: data + b"x", "names 6 samples"),
        (edited(0, b"<html>"), "starts with"),
        (edited(8, b"\x02"), "version 2"),
        (edited(8, b"\x00\x00\x00\x01"), "version 16777216"),
        (edited(32, b"\0" * 32), "tar sha256"),
        (edited(24, b"\1"), "tar bytes"),
        (edited(64, b"\0" * 8), "record 0"),
        (edited(64 + 32, b"\xff" * 8), "record"),
        (edited(64 + 8, b"\xff" * 4), "record"),
        (edited(64 + 12, b"\xf0\xff\xff\xff"), "record 0"),
    ],
)
def test_damaged_indexes_are_refused(
    dataset: tuple[Path, Manifest], damage: Callable[[bytes], bytes], message: str
) -> None:
    folder, manifest = dataset
    entry = manifest.shards[0]
    data = damage((folder / entry.index_name).read_bytes())
    for source in (data, folder / "damaged.idx"):
        (folder / "damaged.idx").write_bytes(data)
        with pytest.raises(ShardError, match=message) as caught:
            TarIndex.open(source, name=entry.name, n=entry.n, tar_size=entry.bytes, tar_sha256=entry.sha256)
        assert caught.value.reason == "index"
        assert entry.name in str(caught.value)


NPY, JSON = encode_npy(latent(0), "float16"), SampleInfo(source="a", frames=2).dump()
KEY = "0123456789abcdef"


def tar_of(members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = (len(data), kind) if kind == tarfile.REGTYPE else (0, kind)
            info.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
            tar.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
    return file.getvalue()


GOOD_TAR = tar_of([(f"{KEY}.npy", NPY), (f"{KEY}.json", JSON), ("f" * 16 + ".npy", NPY), ("f" * 16 + ".json", JSON)])
SAMPLE = 512 + 512 + 512 + 512


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "length", "not a readable tar"),
        (b"<html>404</html>", "member", "not a readable tar"),
        (b"\x1f\x8b" + GOOD_TAR[2:], "member", "not a readable tar"),
        (GOOD_TAR[:SAMPLE], "length", "does not end with zero blocks"),
        (GOOD_TAR[: 2 * SAMPLE], "length", "does not end with zero blocks"),
        (GOOD_TAR[: SAMPLE + 600], "length", "cut after|unexpected end"),
        (GOOD_TAR[: SAMPLE + 100], "length", "does not end|zero blocks"),
        (GOOD_TAR[:SAMPLE] + b"\xff" * 512 + GOOD_TAR[SAMPLE + 512 :], "length", "something follows"),
        (GOOD_TAR + b"garbage", "length", "something follows"),
        (GOOD_TAR + GOOD_TAR, "length", "something follows"),
        (tar_of([(f"{KEY}.npy", NPY)]), "order", "has no .*json beside it"),
        (tar_of([(f"{KEY}.json", JSON)]), "order", "has no .*npy beside it"),
        (tar_of([(f"{KEY}.npy", NPY), ("f" * 16 + ".npy", NPY)]), "order", "has no .*json"),
        (tar_of([(f"{KEY}.npy", NPY), (f"{KEY}.npy", NPY)]), "order", "twice"),
        (tar_of([(f"{KEY}.npy", NPY), (f"{KEY}.json", JSON)] * 2), "order", "twice"),
        (tar_of([(f"{KEY}.npy", NPY), (f"{KEY}.json", JSON), (f"{KEY}.cls", b"1")]), "name", "is not <16 hex"),
        (tar_of([("../x.npy", NPY)]), "name", "is not <16 hex"),
        (tar_of([("a.b.npy", NPY)]), "name", "is not <16 hex"),
        (tar_of([(f"{KEY}.npy", b"")], tarfile.SYMTYPE), "member", "not a regular file"),
        (tar_of([(f"{KEY}.npy", b"")], tarfile.LNKTYPE), "member", "not a regular file"),
        (tar_of([(f"{KEY}.npy", b"")], tarfile.FIFOTYPE), "member", "not a regular file"),
        (tar_of([(f"{KEY}.npy", NPY), (f"{KEY}.json", b"{}")]), "member", "source: Field required"),
        (tar_of([(f"{KEY}.npy", NPY), (f"{KEY}.json", b"\xff")]), "member", "json is refused"),
        (tar_of([(f"{KEY}.npy", NPY[:-2]), (f"{KEY}.json", JSON)]), "header", "bytes long"),
    ],
)
def test_strange_tars_are_refused(tmp_path: Path, data: bytes, reason: str, message: str) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    with pytest.raises(ShardError, match=message) as caught:
        build_index(path, shape=SHAPE, dtype="float16")
    assert caught.value.reason == reason
    assert caught.value.shard == "shard.tar"


def test_good_tar_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(GOOD_TAR)
    index = build_index(path, shape=SHAPE, dtype="float16")
    assert index.records["key"].tolist() == [int(KEY, 16), 2**64 - 1]
    assert index.records["class_id"].tolist() == [-1, -1]


def test_missing_files_are_named(tmp_path: Path) -> None:
    for attempt in (lambda: build_index(tmp_path / "no.tar"), lambda: TarIndex.open(tmp_path / "no.idx")):
        with pytest.raises(ShardError, match=r"no\.(tar|idx)") as caught:
            attempt()
        assert caught.value.reason == "missing"
