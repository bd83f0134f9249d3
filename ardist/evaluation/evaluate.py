"""Scores of a bundle on a held-out dataset: pixels judge the AR-VAE, latents the denoiser."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from ardist.config.data import DataConfig
from ardist.config.training import TrainConfig
from ardist.data.batch import Batch
from ardist.data.loader import read_samples
from ardist.data.manifest import Manifest, load_manifest
from ardist.errors import ConfigError, DataError
from ardist.evaluation import reconstruction
from ardist.inference.bundle import Bundle, load_bundle
from ardist.models.weights import AR_VAE_FILE, load_ar_vae, read_config
from ardist.training.batches import DeviceCopy, single_clips
from ardist.training.distributed import uses_gpu
from ardist.training.objectives import DenoiserObjective

Scores = dict[str, float | int | str]

PCA_COMPONENTS = 128
PCA_FRAMES = 4096
"""Training samples the components are fitted to at most, spread evenly over the dataset."""
_BATCH = 16


def evaluate_bundle(bundle: Path, dataset: str, train_dataset: str | None = None) -> Scores:
    """Judge the part of `bundle` that belongs to the kind of `dataset`; raises `DataError` for what cannot be read."""
    kind = load_manifest(dataset).kind
    if kind == "pixels":
        return evaluate_reconstruction(bundle, dataset, train_dataset)
    if train_dataset is not None:
        raise ConfigError("--train-dataset belongs to a pixel dataset: it feeds the PCA beside the AR-VAE")
    return evaluate_denoising(bundle, dataset)


@torch.no_grad()
def evaluate_reconstruction(bundle: Path, dataset: str, train_dataset: str | None) -> Scores:
    """Mean PSNR [dB], SSIM and flicker of the AR-VAE over held-out clips, beside constant colour and PCA."""
    device = _device()
    ar_vae = load_ar_vae(bundle, device)
    clips = _as_frames(read_samples(dataset).values)
    parts = [ar_vae.decode(ar_vae.encode(part.to(device))).clamp(0, 1).cpu() for part in clips.split(_BATCH)]
    reconstructed = torch.cat(parts)
    scores: Scores = {
        "kind": "reconstruction",
        "clips": len(clips),
        "psnr": reconstruction.psnr(reconstructed, clips).mean().item(),
        "ssim": reconstruction.ssim(reconstructed, clips).mean().item(),
        "flicker": reconstruction.temporal_flicker(reconstructed, clips).mean().item(),
        "constant_colour_psnr": reconstruction.best_constant_colour_psnr(clips).mean().item(),
    }
    if train_dataset is not None:
        frames = _as_frames(_evenly(train_dataset, PCA_FRAMES).values).flatten(0, 1)
        components = min(PCA_COMPONENTS, len(frames))
        scores["pca_components"] = components
        scores["pca_psnr"] = reconstruction.pca_psnr(frames, clips, components).mean().item()
    return scores


def _evenly(dataset: str, most: int) -> Batch:
    total = load_manifest(dataset).num_samples
    return read_samples(dataset, [index * total // min(total, most) for index in range(min(total, most))])


def _as_frames(values: Tensor) -> Tensor:
    """uint8 [b f h w 3] to float [b f 3 h w] in [0, 1]."""
    return values.permute(0, 1, 4, 2, 3).float() / 255


@torch.no_grad()
def evaluate_denoising(bundle: Path, dataset: str) -> Scores:
    """Mean squared error at fixed FoPP staircases, and as a fraction of what predicting zero costs.

    The same staircases and noise as the trainer's validation, over every clip of the dataset.
    """
    device = _device()
    loaded = load_bundle(bundle, device=device)
    manifest = load_manifest(dataset)
    _check_origin(bundle, loaded, manifest, dataset)
    config = TrainConfig(
        task="denoiser",
        run_dir=str(bundle),
        denoiser=loaded.denoiser.config,
        diffusion=loaded.diffusion,
        data=DataConfig(path=dataset),
    )
    objective = DenoiserObjective(config, manifest, device)
    clips = single_clips(DeviceCopy(device)(read_samples(dataset)))
    summary = objective.summarise([objective.evaluate(loaded.denoiser, clip) for clip in clips])
    return {
        "kind": "denoising",
        "clips": summary["clips"],
        "loss": summary["loss"],
        "predict_zero": summary["predict_zero"],
        "fraction_of_predict_zero": summary["fraction_of_predict_zero"],
    }


def _device() -> torch.device:
    return torch.device("cuda" if uses_gpu() else "cpu")


def _check_origin(directory: Path, bundle: Bundle, manifest: Manifest, dataset: str) -> None:
    """The latents must have the denoiser's shape and come from the AR-VAE of the bundle."""
    config = bundle.denoiser.config
    if tuple(manifest.shape[1:]) != (config.tokens_per_frame, config.latent_channels):
        raise DataError(
            f"{dataset!r} holds latents of {tuple(manifest.shape[1:])} per frame, the denoiser of {str(directory)!r} "
            f"takes {(config.tokens_per_frame, config.latent_channels)}"
        )
    digest = read_config(directory)["digests"].get(AR_VAE_FILE)
    if digest is not None and manifest.vae is not None and manifest.vae.weights_digest != digest:
        raise DataError(
            f"the latents of {dataset!r} come from another AR-VAE ({manifest.vae.weights_digest[:16]}…) than the one "
            f"in {str(directory)!r} ({digest[:16]}…)"
        )


def scores_table(scores: Scores) -> Table:
    """Scores as a table for people."""
    table = Table("measure", "value", title=str(scores["kind"]), title_justify="left")
    for name, value in scores.items():
        if name != "kind":
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def write_scores(scores: Scores, path: Path) -> None:
    """Write scores as JSON; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
