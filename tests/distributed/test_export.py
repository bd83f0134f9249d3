"""Checkpoints of both tasks become bundles, whatever layout wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import records, tiny_config, train_outcome, weights, write_latents, write_pixels

from ardist.errors import CheckpointError, ConfigError
from ardist.inference.bundle import load_bundle
from ardist.models.weights import load_ar_vae, read_config
from ardist.training.export import export_bundle

pytestmark = pytest.mark.distributed

AR_VAE = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "tokens_per_frame": 3}


@pytest.fixture(scope="module")
def denoiser_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("denoiser")
    data = write_latents(tmp_path_factory.mktemp("latents"), classes=2)
    config = tiny_config(
        run_dir,
        data,
        training__steps=4,
        training__zero_stage=3,
        training__ema_decays=[0.5, 0.9],
        denoiser__positions="sincos",
        denoiser__num_classes=3,
    )
    assert run_ranks(train_outcome, 2, config) == ["done", "done"]
    return run_dir


@pytest.fixture(scope="module")
def ar_vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ar-vae")
    data = write_pixels(tmp_path_factory.mktemp("pixels"))
    held_out = write_pixels(tmp_path_factory.mktemp("held-out"), samples=8, seed=1)
    changes = {"task": "ar_vae", "denoiser": None, "ar_vae": AR_VAE, "validation__path": str(held_out)}
    config = tiny_config(run_dir, data, training__steps=12, optimizer__lr=3e-3, validation__every=6, **changes)
    assert run_ranks(train_outcome, 2, config) == ["done", "done"]
    return run_dir


def test_a_denoiser_bundle_has_the_raw_and_the_averaged_weights(denoiser_run: Path, tmp_path: Path) -> None:
    bundle = export_bundle(denoiser_run, tmp_path / "bundle")
    for kind, name in (("ema", "ema_0.9"), ("raw", "master")):
        opened = load_bundle(bundle, kind).denoiser.state_dict()
        expected = weights(denoiser_run, name)
        assert set(opened) - set(expected) == {"position_table"}
        assert all(torch.equal(opened[key], value) for key, value in expected.items())
    assert load_bundle(bundle).sampler_defaults.num_frames == 4
    assert load_bundle(bundle).provenance["step"] == 4
    other = export_bundle(denoiser_run, tmp_path / "other", ema_decay=0.5)
    assert load_bundle(other).provenance["ema_decay"] == 0.5


def test_what_cannot_be_exported_is_said(denoiser_run: Path, ar_vae_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable checkpoint of step 3 .*steps there: 4"):
        export_bundle(denoiser_run, tmp_path / "bundle", step=3)
    with pytest.raises(CheckpointError, match=r"no EMA of decay 0.1; it has \[0.5, 0.9\]"):
        export_bundle(denoiser_run, tmp_path / "bundle", ema_decay=0.1)
    ar_vae = export_bundle(ar_vae_run, tmp_path / "ar-vae")
    with pytest.raises(CheckpointError, match="made by another AR-VAE"):
        export_bundle(denoiser_run, tmp_path / "bundle", ar_vae=ar_vae)
    with pytest.raises(ConfigError, match="trained an AR-VAE itself"):
        export_bundle(ar_vae_run, tmp_path / "bundle", ar_vae=ar_vae)
    assert not (tmp_path / "bundle").exists()


def test_an_ar_vae_learns_and_is_exported(ar_vae_run: Path, tmp_path: Path) -> None:
    validations = records(ar_vae_run, "validation")
    assert sorted(validations) == [6, 12]
    assert validations[12]["loss"] < validations[6]["loss"]
    assert all(validations[step]["psnr"] > 5 for step in (6, 12))  # L1 is what is learned
    bundle = export_bundle(ar_vae_run, tmp_path / "bundle")
    opened = load_ar_vae(bundle).state_dict()
    expected = weights(ar_vae_run, "ema_0.9")
    assert all(torch.equal(opened[name], value) for name, value in expected.items())
    assert set(read_config(bundle)["digests"]) == {"ar_vae.safetensors", "ar_vae_raw.safetensors"}
