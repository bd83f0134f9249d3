"""Tars of other writers: safe decoding, and training from them in place once they are indexed."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from dataset_factory import latent, number_of

from ardist.config.data import DataConfig
from ardist.data.errors import ManifestError, ShardError
from ardist.data.foreign import foreign_samples, index_foreign
from ardist.data.loader import StreamingLoader, read_samples
from ardist.data.manifest import VAEIdentity, load_manifest
from ardist.errors import DataError
from ardist.storage import open_storage

VAE = VAEIdentity(weights_digest="a" * 64, config_digest="b" * 64)


def saved(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def write(folder: Path, name: str, samples: list[dict[str, Any]]) -> Path:
    """With the library's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(folder / name), encoder=False) as sink:
        for sample in samples:
            sink.write(sample)
    return folder / name


def sample(number: int, **more: bytes) -> dict[str, Any]:
    return {
        "__key__": f"clips/vidéo {number:04d}",
        "latent.npy": saved(latent(number)),
        "cls": str(number % 3).encode(),
        "txt": f"clip {number}".encode(),
        **more,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(3):
        write(tmp_path / "set", f"train-{shard:02d}.tar", [sample(shard * 20 + i) for i in range(20)])
    return tmp_path / "set"


def test_foreign_tars_become_a_dataset_in_place(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    manifest = index_foreign(folder, kind="latents", vae=VAE, array="latent.npy")
    assert (manifest.num_samples, manifest.shape, manifest.classes) == (60, (2, 3, 4), ("0", "1", "2"))
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before
    batch = read_samples(folder)
    assert [number_of(value) for value in batch.values] == list(range(60))
    assert batch.class_ids is not None
    assert batch.class_ids.tolist() == [number % 3 for number in range(60)]
    assert manifest.latent_statistics is not None
    values = batch.values.double().numpy().reshape(-1, 4)
    assert np.allclose(manifest.latent_statistics.mean, values.mean(0))
    config = DataConfig(path=str(folder), lanes=4, window=8, prefetch_bytes=2**20)
    with StreamingLoader(config, seed=0, global_batch_size=12) as loader:
        seen = [number_of(value) for _ in range(5) for value in next(loader).values]
    assert sorted(seen) == list(range(60))
    assert index_foreign(folder, kind="latents", vae=VAE, array="latent.npy").digest() == manifest.digest()


def test_plain_reading_decodes_safely(folder: Path) -> None:
    samples = list(foreign_samples(str(folder / "train-{00..02}.tar")))
    assert len(samples) == 60
    assert np.array_equal(samples[7]["latent.npy"], latent(7))
    assert samples[7]["cls"] == 1
    assert samples[7]["txt"] == "clip 7"


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    evil = {"__key__": "a", "pyd": pickle.dumps(Bomb()), "pth": pickle.dumps(Bomb()), "json": b"{}"}
    path = write(tmp_path, "evil.tar", [evil])
    (only,) = foreign_samples(str(path))
    assert isinstance(only["pyd"], bytes)
    assert only["json"] == {}
    path = write(tmp_path, "evil.tar", [{"__key__": "a", "npy": saved(np.array([Bomb()]), allow_pickle=True)}])
    with pytest.raises(DataError, match=r"a\.npy.*refused"):
        list(foreign_samples(str(path)))
    with pytest.raises(ShardError, match="refused"):
        index_foreign(tmp_path, kind="latents", vae=VAE)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"__key__": "a", "npy": saved(np.zeros((2, 3, 4), np.float32))}], "'<f4' is refused"),
        ([{"__key__": "a", "npy": saved(np.zeros((2, 3, 4), np.uint8))}], r"\|u1 cannot be latents"),
        (
            [{"__key__": "a", "npy": saved(latent(1))}, {"__key__": "b", "npy": saved(latent(1, (1, 3, 4)))}],
            r"float16 \[1, 3, 4\], those before it float16 \[2, 3, 4\]",
        ),
        ([{"__key__": "a", "npy": saved(latent(1)) + b"x"}], "does not fit its header"),
        ([{"__key__": "a", "npy": saved(latent(1)), "cls": b"cat"}], "not a class number"),
        (
            [{"__key__": "a", "npy": saved(latent(1))}, {"__key__": "b", "txt": b""}, {"__key__": "a", "npy": b"x"}],
            "twice",
        ),
        ([{"__key__": "a", "txt": b""}], "holds no .npy member"),
    ],
)
def test_what_makes_no_dataset_is_refused(tmp_path: Path, samples: list[dict[str, Any]], message: str) -> None:
    write(tmp_path, "x.tar", samples)
    with pytest.raises(ShardError, match=message) as caught:
        index_foreign(tmp_path, kind="latents", vae=VAE)
    assert caught.value.shard == "x.tar"
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("cut", [20 * 512 * 2, 3000, 0])
def test_cut_tars_are_refused(folder: Path, cut: int) -> None:
    path = folder / "train-01.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ShardError, match=r"train-01\.tar"):
        index_foreign(folder, kind="latents", vae=VAE, array="latent.npy")


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="holds no tar"):
        index_foreign(tmp_path, kind="latents", vae=VAE)
    write(tmp_path, "x.tar", [{"__key__": "a", "npy": saved(latent(1))}])
    with pytest.raises(ManifestError, match="must name its VAE"):
        index_foreign(tmp_path, kind="latents")


def test_foreign_tars_of_a_store_become_a_dataset_in_place(folder: Path, bucket_url: str, tmp_path: Path) -> None:
    storage = open_storage(bucket_url)
    for path in folder.iterdir():
        storage.put(f"part/{path.name}", path)
    before = {info.name: info.version for info in storage.walk()}
    manifest = index_foreign(bucket_url, kind="latents", vae=VAE, array="latent.npy", dataset_id="set")
    after = {info.name: info.version for info in storage.walk()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"manifest.json", *(f"part/train-{shard:02d}.idx" for shard in range(3))}
    assert load_manifest(bucket_url) == manifest
    config = DataConfig(path=bucket_url, lanes=4, window=8, prefetch_bytes=2**20, cache_dir=str(tmp_path / "cache"))
    with StreamingLoader(config, seed=0, global_batch_size=12) as loader:
        for _ in range(5):
            batch = next(loader)
            numbers = [number_of(value) for value in batch.values]
            assert np.array_equal(batch.values.numpy(), np.stack([latent(number) for number in numbers]))
            assert batch.class_ids is not None
            assert batch.class_ids.tolist() == [number % 3 for number in numbers]


def test_a_damaged_tar_of_a_store_is_named_and_makes_no_dataset(folder: Path, bucket_url: str) -> None:
    storage = open_storage(bucket_url)
    for path in folder.iterdir():
        data = path.read_bytes()
        storage.put(path.name, data[: len(data) // 2] if path.name == "train-01.tar" else data)
    with pytest.raises(ShardError, match=r"train-01\.tar"):
        index_foreign(bucket_url, kind="latents", vae=VAE, array="latent.npy")
    assert not storage.exists("manifest.json")
    with pytest.raises(DataError, match="holds no tar"):
        index_foreign(f"{bucket_url}/empty", kind="pixels")
