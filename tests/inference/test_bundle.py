"""Bundles: what is written is what is opened, and nothing damaged or foreign is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_cases import make_ar_vae, make_bundle
from safetensors.torch import load_file, save_file
from sampler_cases import random_denoiser

from ardist.config.training import DiffusionConfig
from ardist.errors import CheckpointError, ConfigError, InvalidValueError
from ardist.inference import bundle as bundle_module
from ardist.inference.bundle import load_bundle, verify_bundle, write_bundle
from ardist.models.weights import load_ar_vae, weights_digest


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_both_weights_come_back_with_everything_about_them(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle", make_ar_vae(tmp_path / "vae"), num_classes=3)
    names = {path.name for path in made.iterdir()}
    assert names == {
        "config.json",
        "denoiser.safetensors",
        "denoiser_raw.safetensors",
        "ar_vae.safetensors",
        "sampler.json",
        "README.md",
        "verify.safetensors",
    }
    for kind, seed in (("ema", 1), ("raw", 2)):
        opened = load_bundle(made, kind)
        expected = random_denoiser(seed, num_classes=3)
        for name, value in expected.state_dict().items():
            assert torch.equal(opened.denoiser.state_dict()[name], value)
        assert opened.denoiser.config == expected.config
        assert not opened.denoiser.training
    assert opened.provenance == {"step": 12, "dataset": "abc"}
    assert opened.diffusion == DiffusionConfig()
    assert opened.sampler_defaults.num_inference_steps == 5
    assert opened.ar_vae.config.image_size == 16
    assert load_ar_vae(made).config == opened.ar_vae.config
    assert opened.sampler().window == 4
    assert load_bundle(made, dtype=torch.bfloat16).denoiser.input.weight.dtype == torch.bfloat16
    card = (made / "README.md").read_text()
    assert "step: 12" in card
    assert "16 pixels" in card
    assert "one of 3 classes" in card


def test_config_names_every_file_by_its_digest(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    config = json.loads((made / "config.json").read_text())
    assert (config["format"], config["version"]) == ("ardist-bundle", 1)
    files = {path.name for path in made.iterdir()} - {"config.json"}
    assert config["digests"] == {name: weights_digest(made / name) for name in files}


def test_a_bundle_without_ar_vae_makes_latents_only(tmp_path: Path) -> None:
    opened = load_bundle(make_bundle(tmp_path / "bundle"))
    assert opened.sampler().sample(4, num_inference_steps=5, difference=2).shape == (1, 4, 3, 4)
    with pytest.raises(CheckpointError, match="--ar-vae"):
        _ = opened.ar_vae


def test_a_released_bundle_is_sampled_with_the_recompute_window(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b", mask="released", positions="sincos", context_tokens=2, context_dim=3)
    sampler = load_bundle(made).sampler()
    assert (sampler.window_kind, sampler.window) == ("recompute", 4)


@pytest.mark.parametrize(
    "name", ["denoiser.safetensors", "denoiser_raw.safetensors", "ar_vae.safetensors", "sampler.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    made = make_bundle(tmp_path / "bundle", make_ar_vae(tmp_path / "vae"))
    path = made / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-5])
    with pytest.raises(CheckpointError, match=name):
        verify_bundle(made)
    if name != "ar_vae.safetensors":
        with pytest.raises(CheckpointError, match=name):
            load_bundle(made, "raw" if "raw" in name else "ema")
    else:
        with pytest.raises(CheckpointError, match=name):
            _ = load_bundle(made).ar_vae


def test_verification_runs_the_weights(tmp_path: Path) -> None:
    """Weights that were exchanged together with their digest are still found out."""
    made = make_bundle(tmp_path / "bundle")
    for name in ("denoiser.safetensors", "denoiser_raw.safetensors"):
        state = load_file(made / name)
        state["blocks.1.qkv.weight"] *= 1.2
        save_file(state, made / name)
        config = json.loads((made / "config.json").read_text())
        edit_config(made, digests=config["digests"] | {name: weights_digest(made / name)})
        load_bundle(made, "raw" if "raw" in name else "ema")
        with pytest.raises(CheckpointError, match=f"{name}.*something else"):
            verify_bundle(made)
        state["blocks.1.qkv.weight"] /= 1.2
        save_file(state, made / name)
        edit_config(made, digests=config["digests"] | {name: weights_digest(made / name)})
        verify_bundle(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2.*version 1"),
        ({"format": "other"}, "format is not 'ardist-bundle'"),
        ({"denoiser": None}, "no denoiser"),
        ({"denoiser": {"width": 32, "dept": 2}}, "did you mean 'depth'"),
        ({"diffusion": None}, "section 'diffusion'"),
        ({"digests": {}}, "sampler.json"),
    ],
)
def test_foreign_bundles_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made = make_bundle(tmp_path / "bundle")
    edit_config(made, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_bundle(made)


def test_other_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no bundle"):
        load_bundle(tmp_path / "nothing")
    made = make_bundle(tmp_path / "bundle")
    with pytest.raises(InvalidValueError, match="did you mean 'ema'"):
        load_bundle(made, "emma")
    edit_config(made, denoiser=random_denoiser(width=16).config.model_dump(mode="json"))
    with pytest.raises(CheckpointError, match="denoiser.safetensors"):
        load_bundle(made)
    edit_config(made, digests={"../outside": "0" * 64})
    with pytest.raises(CheckpointError, match="outside the bundle"):
        verify_bundle(made)


def test_an_ar_vae_of_other_latents_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    vae = make_ar_vae(tmp_path / "vae", tokens_per_frame=5)
    with pytest.raises(ConfigError, match=r"\(5, 4\).*\(3, 4\)"):
        make_bundle(tmp_path / "bundle", vae)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    denoiser = random_denoiser()
    state = dict(denoiser.state_dict())
    state.pop("output.bias")
    with pytest.raises(CheckpointError, match=r"output\.bias"):
        write_bundle(
            tmp_path / "bundle",
            denoiser_config=denoiser.config,
            ema_state=state,
            raw_state=None,
            diffusion=DiffusionConfig(),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_an_older_bundle_is_replaced_whole_and_other_directories_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_bundle(tmp_path / "bundle", make_ar_vae(tmp_path / "vae"))
    make_bundle(made)
    assert not (made / "ar_vae.safetensors").exists()
    before = (made / "config.json").read_bytes()

    def fail(directory: Path) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(bundle_module, "verify_bundle", fail)
    with pytest.raises(CheckpointError, match="no"):
        make_bundle(made, num_classes=2)
    assert (made / "config.json").read_bytes() == before
    monkeypatch.undo()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        make_bundle(precious)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "precious", "vae"]


def test_a_bundle_of_averaged_weights_only(tmp_path: Path) -> None:
    denoiser = random_denoiser()
    made = write_bundle(
        tmp_path / "bundle",
        denoiser_config=denoiser.config,
        ema_state=denoiser.state_dict(),
        raw_state=None,
        diffusion=DiffusionConfig(target="v"),
    )
    verify_bundle(made)
    assert load_bundle(made).sampler().target == "v"
    with pytest.raises(CheckpointError, match="denoiser_raw"):
        load_bundle(made, "raw")
    verify_bundle(make_ar_vae(tmp_path / "vae"))
