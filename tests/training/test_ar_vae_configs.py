"""Every published configuration of an AR-VAE is complete: it loads, and nothing but its data and weights is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from ar_vae_runs import write_clips

from ardist.config import TrainConfig, load_config
from ardist.data.manifest import Manifest, load_manifest
from ardist.errors import ConfigError
from ardist.training import preflight

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = sorted(CONFIGS.glob("*/ar_vae*.yaml"))
LEARNING_RATES = {"ucf101": 2e-4, "sky": 2e-4, "taichi": 1e-4, "face": 1e-4}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(str(write_clips(tmp_path_factory.mktemp("data"), samples=4)))


def test_there_are_both_stages_of_four_datasets() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in PUBLISHED}
    assert names == {f"{data}/ar_vae_stage{stage}" for data in LEARNING_RATES for stage in (1, 2)} | {
        "quickstart/ar_vae",
        "quickstart/ar_vae_stage2",
    }


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("ranks", [1, 8])
def test_a_published_configuration_can_start(
    path: Path, ranks: int, small: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(TrainConfig, path, ["init_from=" + str(tmp_path)] if "stage2" in path.stem else [])
    assert config.ar_vae is not None
    size = config.ar_vae.image_size

    def manifest(url: str) -> Manifest:
        frames = 1 if url.endswith(("frames", "train")) else 16
        return small.model_copy(update={"shape": (frames, size, size, 3), "num_samples": 5000})

    monkeypatch.setattr(preflight, "load_manifest", manifest)
    if config.ar_vae_loss.perceptual == "lpips":
        with pytest.raises(ConfigError, match=r"cannot start, 1 problem:\n  ar_vae_loss.perceptual: no perceptual"):
            preflight.check_run(config, ranks, tmp_path)
        config = config.model_copy(update={"ar_vae_loss": config.ar_vae_loss.model_copy(update={"perceptual": "none"})})
    assert preflight.check_run(config, ranks, tmp_path).manifests


@pytest.mark.parametrize("dataset", LEARNING_RATES)
def test_recipes_are_those_of_the_paper(dataset: str) -> None:
    first, second = (
        load_config(TrainConfig, CONFIGS / dataset / f"ar_vae_stage{stage}.yaml", ["init_from=."] * (stage == 2))
        for stage in (1, 2)
    )
    assert first.optimizer.lr == LEARNING_RATES[dataset]
    assert second.optimizer.lr == 1e-6
    assert (first.training.global_batch_size, first.training.steps) == (32, 500_000)
    assert first.ar_vae_loss.adversarial_start in (50_000, 100_000)
    assert (first.ar_vae_loss.discriminator_channels, first.ar_vae_loss.discriminator_layers) == (64, 3)
    assert first.ar_vae_loss.kl_weight == 0.0
    assert (first.trainable, second.trainable) == ("all", "temporal")
    assert second.ar_vae_loss.adversarial_weight == 0.0
    for config in (first, second):
        assert config.ar_vae_loss.reconstruction == "l1"
        assert config.ar_vae_loss.perceptual == "lpips"
        assert config.ar_vae is not None
        assert (config.ar_vae.image_size, config.ar_vae.width, config.ar_vae.depth) == (256, 1024, 24)
    assert second.ar_vae is not None
    assert second.ar_vae.temporal
