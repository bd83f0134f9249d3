"""Bundles judged on datasets: the right part is measured, against known levels, and strangers are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ardist.config import DenoiserConfig
from ardist.config.training import DiffusionConfig
from ardist.data.manifest import fold_shards, write_manifest
from ardist.data.sample import SampleInfo, sample_key
from ardist.data.shard_writer import Sample, write_shard
from ardist.errors import ConfigError, DataError
from ardist.evaluation.evaluate import evaluate_bundle, scores_table, write_scores
from ardist.inference.bundle import SamplerDefaults, write_bundle
from ardist.models.ar_vae import ARVAE, preset
from ardist.models.denoiser import Denoiser
from ardist.models.weights import save_ar_vae


def write_dataset(directory: Path, clips: np.ndarray, kind: str, digest: str | None = None) -> str:
    samples = [
        Sample(
            sample_key(f"{number}.mp4", (0, 1), {}), clip, SampleInfo(source=f"{number}.mp4", frames=len(clip), fps=8)
        )
        for number, clip in enumerate(clips)
    ]
    entry = write_shard(directory, 0, samples, clips.dtype.name)
    manifest = fold_shards(
        [entry],
        dataset_id="test",
        created="2025-01-01T00:00:00Z",
        code_version="0",
        kind=kind,
        vae=None if digest is None else {"weights_digest": digest, "config_digest": "b" * 64},
    )
    write_manifest(directory, manifest)
    return str(directory)


def unit_latents(clips: int, frames: int = 4) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((clips, frames, 3, 4))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float16)


@pytest.fixture
def ar_vae(tmp_path: Path) -> tuple[Path, str]:
    torch.manual_seed(0)
    model = ARVAE(preset("tiny", width=16, depth=1, num_heads=2, image_size=16, tokens_per_frame=3))
    return tmp_path / "ar-vae", save_ar_vae(tmp_path / "ar-vae", model)


def make_bundle(out: Path, ar_vae: Path | None, silent: bool) -> Path:
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(width=16, depth=1, num_heads=2, tokens_per_frame=3))
    if not silent:
        torch.nn.init.normal_(next(p for n, p in reversed(list(model.named_parameters())) if p.ndim == 2))
    return write_bundle(
        out,
        denoiser_config=model.config,
        ema_state=model.state_dict(),
        raw_state=model.state_dict(),
        diffusion=DiffusionConfig(),
        ar_vae_dir=ar_vae,
        sampler_defaults=SamplerDefaults(num_frames=4),
        provenance={},
    )


def test_pixels_judge_the_ar_vae(tmp_path: Path, ar_vae: tuple[Path, str]) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 2, 16, 16, 3), dtype=np.uint8)
    frames[3:] = 128  # a constant colour is reproduced exactly by the best constant colour
    held_out = write_dataset(tmp_path / "held-out", frames[:3], "pixels")
    train = write_dataset(tmp_path / "train", np.repeat(frames[:3], 40, axis=0), "pixels")
    scores = evaluate_bundle(ar_vae[0], held_out, train_dataset=train)
    assert scores["clips"] == 3
    noise_level = -10 * np.log10((frames[:3] / 255 - (frames[:3] / 255).mean(axis=(1, 2, 3), keepdims=True)).var())
    assert float(scores["constant_colour_psnr"]) == pytest.approx(noise_level, abs=0.05)
    assert float(scores["pca_psnr"]) > 60  # six distinct frames lie in the span of what was fitted
    assert float(scores["psnr"]) < float(scores["pca_psnr"])
    write_scores(scores, tmp_path / "deep" / "scores.json")
    assert json.loads((tmp_path / "deep" / "scores.json").read_text()) == scores
    assert scores_table(scores).row_count == len(scores) - 1


def test_a_denoiser_that_predicts_zero_stands_at_the_predict_zero_level(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "latents", unit_latents(3), "latents", "a" * 64)
    silent = evaluate_bundle(make_bundle(tmp_path / "silent", None, silent=True), dataset)
    assert float(silent["predict_zero"]) == pytest.approx(0.25, abs=1e-3)
    assert float(silent["fraction_of_predict_zero"]) == pytest.approx(1.0, abs=1e-6)
    loud = evaluate_bundle(make_bundle(tmp_path / "loud", None, silent=False), dataset)
    assert float(loud["fraction_of_predict_zero"]) != pytest.approx(1.0, abs=1e-3)


def test_strangers_are_refused(tmp_path: Path, ar_vae: tuple[Path, str]) -> None:
    bundle = make_bundle(tmp_path / "bundle", ar_vae[0], silent=True)
    own = write_dataset(tmp_path / "own", unit_latents(2), "latents", ar_vae[1])
    assert evaluate_bundle(bundle, own)["clips"] == 2
    other = write_dataset(tmp_path / "other", unit_latents(2), "latents", "c" * 64)
    with pytest.raises(DataError, match="another AR-VAE"):
        evaluate_bundle(bundle, other)
    shape = write_dataset(tmp_path / "shape", unit_latents(2)[:, :, :2], "latents", ar_vae[1])
    with pytest.raises(DataError, match=r"\(2, 4\) per frame"):
        evaluate_bundle(bundle, shape)
    with pytest.raises(ConfigError, match="--train-dataset"):
        evaluate_bundle(bundle, own, train_dataset=own)
    with pytest.raises(DataError, match="absent"):
        evaluate_bundle(bundle, str(tmp_path / "absent"))
