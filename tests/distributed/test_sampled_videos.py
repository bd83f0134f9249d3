"""Videos sampled during training: the averaged weights, every rank its share, the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks, run_ranks
from tiny import FRAMES, losses, records, tiny_config, train_outcome, write_latents

from ardist.data.manifest import VAEIdentity, load_manifest, write_manifest
from ardist.errors import ConfigError
from ardist.inference.video_io import read_frames
from ardist.models.ar_vae import ARVAE, preset
from ardist.models.weights import AR_VAE_FILE, read_config, save_ar_vae
from ardist.training.callbacks import Callback
from ardist.training.callbacks.sampled_videos import averaged_denoiser
from ardist.training.preflight import check_run
from ardist.training.trainer import Trainer, train

pytestmark = pytest.mark.distributed

STEPS = 4
NAMES = [f"s{difference:02d}-video-{video:02d}" for difference in (0, 2) for video in range(3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """Latents that the autoencoder of the bundle is said to have made."""
    folder = write_latents(tmp_path_factory.mktemp("latents"), samples=16, classes=2)
    manifest = load_manifest(folder)
    digest = read_config(bundle)["digests"][AR_VAE_FILE]
    vae = VAEIdentity(weights_digest=digest, config_digest="1" * 64)
    write_manifest(folder, manifest.model_copy(update={"vae": vae}))
    return folder


def write_bundle(directory: Path, tokens: int) -> Path:
    torch.manual_seed(0)
    save_ar_vae(directory, ARVAE(preset("tiny", image_size=16, patch_size=8, tokens_per_frame=tokens)))
    return directory


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AR-VAE that decodes three tokens of four channels per frame."""
    return write_bundle(tmp_path_factory.mktemp("bundle"), tokens=3)


def config_of(run_dir: Path, data: Path, bundle: Path, **changes: Any) -> Any:
    samples = {"every": 2, "num_videos": 3, "differences": [0, 2], "num_inference_steps": 4}
    defaults = {f"samples__{name}": value for name, value in samples.items()}
    defaults |= {"samples__ar_vae": str(bundle), "training__steps": STEPS, "denoiser__num_classes": 2}
    return tiny_config(run_dir, data, **{**defaults, **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path, bundle: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("alone")
    assert run_ranks(train_outcome, 1, config_of(run_dir, data, bundle)) == ["done"]
    return run_dir


def video(run_dir: Path, name: str, step: int = STEPS) -> np.ndarray:
    return read_frames(run_dir / "samples" / f"step-{step:08d}" / f"{name}.mp4", 16)


def test_every_video_is_there_and_recorded(alone: Path) -> None:
    sampled = records(alone, "samples")
    assert sorted(sampled) == [2, 4]
    for step, record in sampled.items():
        assert record["videos"] == 6
        assert record["media"] == {name: f"samples/step-{step:08d}/{name}.mp4" for name in NAMES}
    assert video(alone, NAMES[0]).shape == (FRAMES, 16, 16, 3)
    assert not np.array_equal(video(alone, "s00-video-00"), video(alone, "s00-video-01"))


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3)])
def test_ranks_share_the_list_and_the_videos_are_the_same(
    tmp_path: Path, data: Path, bundle: Path, alone: Path, ranks: int, stage: int
) -> None:
    config = config_of(tmp_path, data, bundle, training__zero_stage=stage)
    assert run_ranks(train_outcome, ranks, config) == ["done"] * ranks
    assert records(tmp_path, "samples")[STEPS]["media"] == records(alone, "samples")[STEPS]["media"]
    for name in NAMES:
        difference = video(tmp_path, name).astype(int) - video(alone, name).astype(int)
        assert np.abs(difference).max() <= 4, "weights differ in their last bits, and so may a rounded pixel"


def test_sampling_leaves_no_trace_in_the_training(tmp_path: Path, data: Path, bundle: Path, alone: Path) -> None:
    assert run_ranks(train_outcome, 1, config_of(tmp_path, data, bundle, samples__every=None)) == ["done"]
    assert losses(tmp_path) == losses(alone)
    assert not (tmp_path / "samples").exists()


def _weights(config: Any) -> list[bool]:
    class Compare(Callback):
        def on_end(self, trainer: Trainer) -> None:
            denoiser = averaged_denoiser(trainer)
            assert trainer.ema is not None
            trainer.engine.fragments.exchange(trainer.ema.buffers[0.9])
            for name, value in trainer.engine.module.state_dict().items():
                same.append(torch.equal(denoiser.state_dict()[name], value))
            trainer.engine.fragments.exchange(trainer.ema.buffers[0.9])

    same: list[bool] = []
    train(config, [Compare()])
    return same


def test_the_weights_are_the_average_of_the_largest_decay_bit_for_bit(tmp_path: Path, data: Path, bundle: Path) -> None:
    config = config_of(tmp_path, data, bundle, samples__every=None, training__ema_decays=[0.5, 0.9])
    for same in run_ranks(_weights, 2, config):
        assert len(same) > 10
        assert all(same)


def test_a_disk_that_is_full_costs_the_videos_and_not_the_run(tmp_path: Path, data: Path, bundle: Path) -> None:
    fault = {"ARDIST_FAULT": "raise@samples.before_write/1#1:28"}
    outcomes = Ranks(train_outcome, 2, config_of(tmp_path, data, bundle), env=fault).wait()
    assert [outcome.value for outcome in outcomes] == ["done", "done"]
    assert json.loads((tmp_path / "summary.json").read_text())["events"]["samples.failed"] == 1
    assert records(tmp_path, "samples")[2]["videos"] == 3, "those of the other rank"
    assert records(tmp_path, "samples")[4]["videos"] == 6


def test_an_autoencoder_that_cannot_decode_is_refused_at_once(tmp_path: Path, data: Path, bundle: Path) -> None:
    other = write_bundle(tmp_path / "other", tokens=5)
    labelled = write_latents(tmp_path / "labelled", samples=16, classes=2)
    for source, changes, text in (
        (data, {"samples__ar_vae": str(other)}, "decodes 5 tokens x 4 channels per frame; the denoiser makes 3 x 4"),
        (data, {"samples__ar_vae": str(tmp_path)}, "samples.ar_vae: "),
        (labelled, {}, "the latents were made by 000000000000…"),
    ):
        config = config_of(tmp_path / "run", source, bundle, **changes)
        with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
            check_run(config, 1, tmp_path / "run" / "checkpoints")


SINCOS = {"denoiser__positions": "sincos", "denoiser__max_frames": 4}


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({**SINCOS, "samples__num_frames": 5}, ["5 frames do not fit the denoiser's sincos table"]),
        (
            {"denoiser__mask": "released", "samples__num_frames": 9, "samples__differences": [0, 1, 4]},
            ["difference=0 is too small for a recompute window of 4 frames", "legal: 1..4"],
        ),
        (
            {"diffusion__num_timesteps": 4},
            ["num_steps=4 must divide num_timesteps=4 and be smaller; legal: 1, 2"],
        ),
        (
            {**SINCOS, "denoiser__mask": "released", "denoiser__window": 8, "samples__num_frames": 9}
            | {"denoiser__latent_channels": 8},
            ["difference=0 is too small", "samples.ar_vae: ", "latents of 3 tokens x 4 channels", "3 problems:"],
        ),
    ],
)
def test_what_could_not_be_sampled_is_refused_at_once_with_everything_else(
    tmp_path: Path, data: Path, bundle: Path, changes: dict[str, Any], texts: list[str]
) -> None:
    config = config_of(tmp_path / "run", data, bundle, **changes)
    with pytest.raises(ConfigError) as refused:
        check_run(config, 1, tmp_path / "run" / "checkpoints")
    assert not torch.distributed.is_initialized()
    for text in texts:
        assert text in str(refused.value)


def test_longer_videos_of_a_denoiser_with_a_window_are_seen_through_that(
    tmp_path: Path, data: Path, bundle: Path
) -> None:
    changes = {"denoiser__window": 2, "samples__num_frames": 7, "samples__every": 4, "samples__num_videos": 1}
    assert run_ranks(train_outcome, 1, config_of(tmp_path, data, bundle, **changes)) == ["done"]
    assert video(tmp_path, "s02-video-00").shape[0] == 7
    assert "samples.failed" not in json.loads((tmp_path / "summary.json").read_text())["events"]
