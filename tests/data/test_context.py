"""Text embeddings beside the latents: verified, served and substituted like them; datasets without stay as they are."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from dataset_factory import VAE, key_of, latent, make_dataset, number_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ardist.config.data import DataConfig
from ardist.data.batch import RowBuffer
from ardist.data.errors import ManifestError, ShardError
from ardist.data.loader import BatchLoader, open_loader, read_samples
from ardist.data.manifest import Manifest, check_manifest, fold_shards, load_manifest, write_manifest
from ardist.data.sample import SampleInfo, encode_npy
from ardist.data.shard_writer import Sample, write_shard
from ardist.data.tar_index import CONTEXT_RECORD, HEADER, RECORD, TarIndex, build_index
from ardist.errors import DataError, InvalidValueError
from ardist.events import events
from data_tools.verify import verify

COUNTS = [30, 31, 29]
CONTEXT = (5, 6)


def context_of(number: int, shape: tuple[int, ...] = CONTEXT) -> np.ndarray:
    return np.random.default_rng(number + 10**6).standard_normal(shape).astype(np.float16)


def samples(first: int, count: int, **changes: Any) -> list[Sample]:
    info = SampleInfo(source="x", frames=2)
    return [Sample(key_of(i), latent(i), info, context_of(i))._replace(**changes) for i in range(first, first + count)]


def make_with_context(folder: Path, counts: list[int]) -> Manifest:
    entries, first = [], 0
    for number, count in enumerate(counts):
        entries.append(write_shard(folder, number, samples(first, count), "float16"))
        first += count
    header = {"dataset_id": "c", "created": "", "code_version": "", "kind": "latents", "vae": VAE}
    manifest = fold_shards(entries, **header)
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, make_with_context(tmp_path, COUNTS)


def loader_of(path: Path | str, **options: Any) -> BatchLoader:
    fields = {"path": str(path), "lanes": 4, "window": 8, "prefetch_bytes": 2**20, "max_bad_fraction": 1.0}
    config = DataConfig(**{**fields, **options})
    return open_loader(config, seed=1, global_batch_size=12)


def serve(loader: BatchLoader, steps: int = 14, *, plain_ids: bool = True) -> set[int]:
    seen = set()
    with loader:
        for _ in range(steps):
            batch = next(loader)
            assert batch.context is not None
            assert (batch.context.shape, batch.context.dtype) == ((12, *CONTEXT), torch.float16)
            for value, context, bits in zip(batch.values, batch.context, batch.sample_ids.tolist(), strict=True):
                number = number_of(value)
                assert not plain_ids or key_of(number) == f"{bits & (2**64 - 1):016x}"
                assert np.array_equal(value.numpy(), latent(number))
                assert np.array_equal(context.numpy(), context_of(number))
                seen.add(number)
    return seen


def test_every_sample_comes_with_its_context(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    assert manifest.context_shape == CONTEXT
    assert load_manifest(folder) == manifest
    assert serve(loader_of(folder)) == set(range(90))
    batch = read_samples(folder, [89, 0, 31])
    assert batch.context is not None
    assert np.array_equal(batch.context.numpy(), np.stack([context_of(i) for i in (89, 0, 31)]))


def test_the_index_is_the_documented_one_and_other_readers_open_the_tar(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    entry = manifest.shards[0]
    data = (folder / entry.index_name).read_bytes()
    tar = (folder / entry.name).read_bytes()
    assert (HEADER.itemsize, CONTEXT_RECORD.itemsize, len(data)) == (64, 56, 64 + 56 * 30)
    assert [int.from_bytes(data[a:b], "little") for a, b in [(8, 12), (12, 16), (16, 24)]] == [2, 56, 30]
    for row in (0, 7, 29):
        record = data[64 + 56 * row :][:56]
        for column, member in ((0, encode_npy(latent(row), "float16")), (32, encode_npy(context_of(row), "float16"))):
            offset = int.from_bytes(record[column : column + 8], "little")
            size = int.from_bytes(record[column + 8 : column + 12], "little")
            assert tar[offset : offset + size] == member
        assert record[44:48] == bytes(4)
    found = list(webdataset.WebDataset(str(folder / entry.name), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [key_of(number) for number in range(30)]
    for number, sample in enumerate(found):
        assert np.array_equal(np.load(io.BytesIO(sample["npy"]), allow_pickle=False), latent(number))
        assert np.array_equal(np.load(io.BytesIO(sample["context.npy"]), allow_pickle=False), context_of(number))
    built = build_index(folder / entry.name, shape=(2, 3, 4), dtype="float16", context=CONTEXT)
    assert built.to_bytes() == data


def test_verify_knows_the_second_member(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    assert not verify(str(folder)).problems
    flip(folder, manifest, 0, 1, 130)
    assert verify(str(folder)).problems


def test_a_dataset_without_context_is_what_it_was(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, [6, 2])
    assert b"context" not in manifest.dump()
    assert "context_shape" not in json.loads(manifest.dump())["shards"][0]
    assert "context_shape" not in manifest.shards[0].model_dump(mode="json")
    assert TarIndex.open(tmp_path / manifest.shards[0].index_name).records.dtype == RECORD
    fields = manifest.model_dump(mode="json", exclude={"created"})
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == manifest.digest()
    assert "context" not in text
    assert read_samples(tmp_path).context is None


def flip(folder: Path, manifest: Manifest, shard: int, row: int, byte: int) -> int:
    entry = manifest.shards[shard]
    offset = int(TarIndex.open(folder / entry.index_name).records["context_offset"][row])
    with (folder / entry.name).open("r+b") as file:
        file.seek(offset + byte)
        old = file.read(1)
        file.seek(offset + byte)
        file.write(bytes([old[0] ^ 16]))
    return offset


@pytest.mark.parametrize("byte", [0, 20, 128, 130, 187])
def test_a_damaged_context_is_named_and_never_served(dataset: tuple[Path, Manifest], byte: int) -> None:
    folder, manifest = dataset
    offset = flip(folder, manifest, 1, 4, byte)
    loader = loader_of(folder)
    assert serve(loader) == set(range(90)) - {34}
    event = loader.substitutions[0]
    assert {item.sample for item in loader.substitutions} == {key_of(34)}
    assert (event.shard, event.offset, event.reason) == (manifest.shards[1].name, offset, "checksum")
    with pytest.raises(DataError, match=f"{manifest.shards[1].name} at byte {offset}"):
        read_samples(folder)


def test_damaged_indexes_are_rebuilt_with_the_context(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    for shard, place in ((0, 64 + 56 * 3 + 33), (1, 8), (2, 100)):
        path = folder / manifest.shards[shard].index_name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
    events.clear()
    assert serve(loader_of(folder)) == set(range(90))
    assert events.snapshot()["loader.index_rebuilt"] == 3


def test_context_spans_outside_the_tar_or_inside_the_values_are_refused(dataset: tuple[Path, Manifest]) -> None:
    folder, manifest = dataset
    index = TarIndex.open(folder / manifest.shards[0].index_name)
    values = int(index.records["offset"][5])
    for name, value in (("context_offset", 2**63), ("context_offset", values), ("context_size", 2**31)):
        records = np.array(index.records)
        records[name][5] = value
        damaged = TarIndex(records, index.tar_size, index.tar_sha256).to_bytes()
        with pytest.raises(ShardError, match="record 5 "):
            TarIndex.open(damaged)


def test_what_a_writer_may_not_write(tmp_path: Path) -> None:
    good = samples(0, 3)
    nan = context_of(1)
    nan[2, 3] = np.nan
    for sample, error, message in [
        (good[1]._replace(context=None), InvalidValueError, "has context none, the shard began with"),
        (good[1]._replace(context=context_of(1, (5, 7))), InvalidValueError, r"has context \[5, 7\]"),
        (good[1]._replace(context=context_of(1).astype(np.float32)), InvalidValueError, "dtype <f4"),
        (good[1]._replace(context=nan), ShardError, "context holds NaN"),
    ]:
        with pytest.raises(error, match=message):
            write_shard(tmp_path, 0, [good[0], sample, good[2]], "float16")
        assert not list((tmp_path / "shards").iterdir())
    with pytest.raises(InvalidValueError, match="has context"):
        write_shard(tmp_path, 0, [good[0]._replace(context=None), good[1]], "float16")


def test_tars_whose_members_are_not_those_of_the_dataset(dataset: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = dataset
    with pytest.raises(ShardError, match=r"context\.npy' is not <16 hex digits>\.npy or \.json"):
        build_index(folder / manifest.shards[0].name, shape=(2, 3, 4), dtype="float16")
    with pytest.raises(ShardError, match="its context: the npy member holds"):
        build_index(folder / manifest.shards[0].name, shape=(2, 3, 4), dtype="float16", context=(6, 5))
    plain = make_dataset(tmp_path / "plain", [4])
    with pytest.raises(ShardError, match=r"has no [0-9a-f]{16}\.context\.npy beside it"):
        build_index(tmp_path / "plain" / plain.shards[0].name, context=CONTEXT)


def test_manifests_and_mixtures_that_do_not_fit(dataset: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = dataset
    plain = make_dataset(tmp_path / "plain", [40], num_classes=None)
    header = {"dataset_id": "c", "created": "", "code_version": "", "kind": "latents", "vae": VAE}
    with pytest.raises(ManifestError, match="1 shards do not have the dataset's context"):
        fold_shards([*manifest.shards, plain.shards[0].model_copy(update={"name": "shards/z.tar"})], **header)
    check_manifest(manifest, {"context_shape": CONTEXT})
    with pytest.raises(ManifestError, match=r"context_shape: the dataset has \[5, 6\], the run needs \[77, 768\]"):
        check_manifest(manifest, {"context_shape": (77, 768)})
    mixture = [{"path": str(path), "weight": 1} for path in (folder, tmp_path / "plain")]
    with pytest.raises(ManifestError, match="no text embeddings"):
        loader_of("", mixture=mixture)


def test_mixtures_carry_the_context(dataset: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, _ = dataset
    make_with_context(tmp_path / "other", [40])
    mixture = [{"path": str(path), "weight": 1} for path in (folder, tmp_path / "other")]
    for by in ("sample", "step"):
        seen = serve(loader_of("", mixture=mixture, mixture_by=by), plain_ids=by == "step")
        assert len(seen) > 40


def test_memory_counts_the_context(dataset: tuple[Path, Manifest]) -> None:
    folder, _ = dataset
    plain = RowBuffer.bytes_for(12, (2, 3, 4), "float16")
    assert RowBuffer.bytes_for(12, (2, 3, 4), "float16", (77, 768)) >= plain + 12 * 77 * 768 * 2
    assert loader_of(folder)._whole_windows == [False]
    assert loader_of(folder)._rows == {((2, 3, 4), "float16", CONTEXT): 12}


def test_from_a_store_too(dataset: tuple[Path, Manifest], bucket_url: str, tmp_path: Path, monkeypatch: Any) -> None:
    from ardist.data import remote_source
    from ardist.storage import open_storage

    folder, _ = dataset
    storage = open_storage(bucket_url)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(folder).as_posix(), path)
    assert serve(loader_of(bucket_url, cache_dir=str(tmp_path / "cache"))) == set(range(90))
    # In parts, whose last sample ends with its context.
    monkeypatch.setattr(remote_source, "PART_BYTES", 8 * 1024)
    assert serve(loader_of(bucket_url, cache_dir=str(tmp_path / "parts"))) == set(range(90))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    st.integers(0, 2**32),
)
def test_round_trip_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], shape: tuple[int, int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(seed)
    contexts = [rng.standard_normal(shape).astype(np.float16) for _ in range(sum(counts))]
    entries, first = [], 0
    for number, count in enumerate(counts):
        written = [s._replace(context=contexts[first + i]) for i, s in enumerate(samples(first, count))]
        entries.append(write_shard(folder, number, written, "float16"))
        first += count
    header = {"dataset_id": "c", "created": "", "code_version": "", "kind": "latents", "vae": VAE}
    write_manifest(folder, fold_shards(entries, **header))
    batch = read_samples(folder)
    assert batch.context is not None
    assert np.array_equal(batch.context.numpy(), np.stack(contexts))
    damaged = int(rng.integers(sum(counts)))
    shard = int(np.searchsorted(np.cumsum(counts), damaged, side="right"))
    row = damaged - sum(counts[:shard])
    flip(folder, load_manifest(folder), shard, row, int(rng.integers(128 + shape[0] * shape[1] * 2)))
    with pytest.raises(DataError, match=key_of(damaged)):
        read_samples(folder)
