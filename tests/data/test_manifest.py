"""The manifest: what it refuses, what its digest covers, and the fold of its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_factory import VAE, latent, make_dataset

from ardist.data.errors import ManifestError
from ardist.data.loader import read_samples
from ardist.data.manifest import check_manifest, fold_shards, load_manifest, parse_manifest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(folder, [5, 3, 1])
    return folder


def test_round_trip_and_digest(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    assert parse_manifest(manifest.dump(), "again") == manifest
    assert (dataset / "manifest.json").read_bytes() == manifest.dump()
    assert manifest.model_copy(update={"created": "later"}).digest() == manifest.digest()
    assert manifest.model_copy(update={"dataset_id": "other"}).digest() != manifest.digest()


def test_fold_does_not_depend_on_the_order_of_shards(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    header = {"dataset_id": "test", "created": "", "code_version": "0", "kind": "latents", "vae": VAE}
    folded = [fold_shards(shards, **header) for shards in (manifest.shards, manifest.shards[::-1])]
    assert folded[0].dump() == folded[1].dump()


def test_statistics_are_those_of_the_latents(dataset: Path) -> None:
    statistics = load_manifest(dataset).latent_statistics
    assert statistics is not None
    values = np.stack([latent(number) for number in range(9)]).astype(np.float64).reshape(-1, 4)
    assert statistics.count == len(values)
    assert np.allclose(statistics.mean, values.mean(0), rtol=1e-12)
    assert np.allclose(statistics.std, values.std(0), rtol=1e-9)


def change(path: str, value: Any) -> Any:
    """A function that sets the dotted path in a manifest's plain form."""

    def apply(raw: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        node: Any = raw
        for part in parents:
            node = node[part]
        node[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("schema_version", 2), "schema version 2; this program reads version 1"),
        (change("num_samples", 8), "num_samples is 8, but the shards' n sum to 9"),
        (change("num_bytes", 8), "num_bytes is 8"),
        (change("shards.0.n", -5), "shards.0.n"),
        (change("shards.0.n", 2**70), "shards.0.n"),
        (change("shards.0.name", "../../etc/x.tar"), "plain relative path"),
        (change("shards.0.name", "/x.tar"), "plain relative path"),
        (change("shards.0.sha256", "zz"), "shards.0.sha256"),
        (change("shards.0.shape", [2, 3, 5]), "1 shards are not float16 [2, 3, 4]"),
        (change("dtype", "uint8"), "latents are float16 or bfloat16"),
        (change("shape", [2, 3]), "latents are float16 or bfloat16 [F, L, C]"),
        (change("vae", None), "must name its VAE"),
        (change("surprise", 1), "surprise"),
        (change("classes", ["a", "a"]), "twice"),
        (change("latent_statistics.std", [1.0, 0.0, 1.0, 1.0]), "positive deviations"),
        (change("latent_statistics.std", [1.0]), "4 channels"),
        (change("shards", []), "shards"),
        (lambda raw: raw["shards"].append(raw["shards"][0]), "listed twice"),
    ],
)
def test_contradictions_are_refused_with_their_place(dataset: Path, damage: Any, message: str) -> None:
    raw = json.loads(load_manifest(dataset).dump())
    damage(raw)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(json.dumps(raw).encode(), "here/manifest.json")
    assert "here/manifest.json" in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("data", [b"", b"<html>", b"[1]", b"\xff\xfe", b"{" * 100_000])
def test_what_is_not_a_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(data, "m")


def test_all_differences_to_the_run_are_listed(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    check_manifest(
        manifest,
        {
            "kind": "latents",
            "shape": (None, 3, 4),
            "dtype": "float16",
            "vae_weights_digest": "a" * 64,
            "vae_config_digest": None,
            "num_classes": 5,
            "digest": manifest.digest(),
        },
    )
    with pytest.raises(ManifestError) as caught:
        check_manifest(
            manifest, {"shape": (2, 3, 8), "vae_weights_digest": "c" * 64, "num_classes": 4, "digest": "0"}, "the data"
        )
    text = str(caught.value)
    assert text.startswith("the data does not fit")
    assert all(word in text for word in ("shape: the dataset has [2, 3, 4]", "cccc", "num_classes", "digest"))
    with pytest.raises(TypeError, match="legal"):
        check_manifest(manifest, {"colour": 1})


def test_no_manifest_is_one_message(tmp_path: Path) -> None:
    from ardist.errors import DataError

    with pytest.raises(DataError, match=r"manifest\.json"):
        read_samples(tmp_path)
