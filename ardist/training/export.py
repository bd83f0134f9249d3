"""From a checkpoint to an inference bundle: averaged and raw weights, in one process, without a process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ardist.config import ARVAEConfig, DenoiserConfig, check, parse_yaml
from ardist.config.training import CheckpointConfig, DiffusionConfig
from ardist.errors import CheckpointError, ConfigError
from ardist.inference.bundle import SamplerDefaults, write_bundle
from ardist.inference.publish import publish_directory
from ardist.models.ar_vae import ARVAE
from ardist.models.weights import (
    AR_VAE_FILE,
    is_bundle,
    load_ar_vae,
    load_into,
    read_config,
    save_ar_vae,
    write_config,
    write_state,
)
from ardist.training.commit import Commit, candidates, newest_valid
from ardist.training.distributed import World
from ardist.training.object_store import open_store
from ardist.training.parts import EXTRA_FILE, PartsReader, holds_fragments
from ardist.training.resume import find

AR_VAE_RAW_FILE = "ar_vae_raw.safetensors"

State = dict[str, torch.Tensor]


def export_bundle(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    ar_vae: str | os.PathLike[str] | None = None,
    step: int | None = None,
    *,
    ema_decay: float | None = None,
) -> Path:
    """Write the newest valid checkpoint of a run (or that of `step`) as a verified bundle and return its path.

    Args:
        run_dir: a run directory of either task.
        out: the bundle; an older bundle there is replaced, anything else is refused.
        ar_vae: a bundle with the AR-VAE that made the latents, to be copied in; for denoiser runs only.
        ema_decay: which average becomes the main weights; by default that of the largest decay.

    Raises:
        CheckpointError: no valid checkpoint; an average that was not kept; an AR-VAE other than the data's.
        ConfigError: `ar_vae` with an AR-VAE run, or `out` is something else than a bundle.
    """
    with _checkpoint(Path(run_dir).expanduser(), step) as (path, commit):
        raw = read_weights(path, commit, "master")
        decay = _chosen_decay(path, commit, ema_decay)
        averaged = raw if decay is None else read_weights(path, commit, commit.kind_of_ema(decay))
    provenance = {
        "run": Path(run_dir).resolve().name,
        "step": commit.step,
        "ema_decay": decay,
        "config_digest": commit.config_digest,
        "manifest_digest": commit.manifest_digest,
        "data": commit.state.get("dataset", {}),
        "versions": commit.versions,
    }
    target = Path(out).expanduser()
    if commit.config.get("task") == "ar_vae":
        if ar_vae is not None:
            raise ConfigError(f"{run_dir} trained an AR-VAE itself; --ar-vae belongs to denoiser runs")
        return _write_ar_vae(target, check(ARVAEConfig, commit.config["ar_vae"], str(path)), averaged, raw, provenance)
    diffusion = check(DiffusionConfig, commit.config["diffusion"], str(path))
    if ar_vae is not None:
        _check_ar_vae(Path(ar_vae).expanduser(), commit)
    return write_bundle(
        target,
        denoiser_config=check(DenoiserConfig, commit.config["denoiser"], str(path)),
        ema_state=averaged,
        raw_state=raw,
        diffusion=diffusion,
        ar_vae_dir=None if ar_vae is None else Path(ar_vae).expanduser(),
        sampler_defaults=_sampler_defaults(commit, diffusion),
        provenance=provenance,
    )


@contextmanager
def _checkpoint(run_dir: Path, step: int | None) -> Iterator[tuple[Path, Commit]]:
    """The newest valid checkpoint of a run, or that of `step`: from its directory, or from the object store that its
    configuration names."""
    root, written = run_dir / "checkpoints", run_dir / "config.resolved.yaml"
    settings = parse_yaml(written.read_text(encoding="utf-8"), str(written)) if written.is_file() else {}
    checkpoint = check(CheckpointConfig, settings.get("checkpoint") or {}, str(written))
    if checkpoint.url is None or candidates(root):
        yield newest_valid(root, step)
        return
    store, alone = open_store(checkpoint, root), World(0, 1, torch.device("cpu"))
    found = find(store, alone, step)
    if found is None:
        raise CheckpointError(f"no checkpoint in {store.where}")
    try:
        yield found
    finally:
        store.release(found[0], alone)


def read_weights(path: Path, commit: Commit, kind: str) -> State:
    """A whole state dict (fp32) from a checkpoint: one kind of state, plus buffers and frozen parameters."""
    reader = PartsReader(path, [part.file for part in commit.parts if holds_fragments(part.file)], commit.shapes)
    state = {name: reader.full(kind, name) for name in commit.shapes}
    if any(part.file == EXTRA_FILE for part in commit.parts):
        state |= load_file(path / EXTRA_FILE)
    return state


def _chosen_decay(path: Path, commit: Commit, wanted: float | None) -> float | None:
    if wanted is None:
        return max(commit.ema_decays, default=None)
    if wanted not in commit.ema_decays:
        raise CheckpointError(f"{path} has no EMA of decay {wanted}; it has {list(commit.ema_decays)}")
    return wanted


def _check_ar_vae(bundle: Path, commit: Commit) -> None:
    """The AR-VAE must be the one whose latents the denoiser learned: another one decodes them to noise."""
    made_with = commit.state.get("dataset", {}).get("vae_weights_digest")
    digests = read_config(bundle).get("digests", {})
    if made_with is not None and digests.get(AR_VAE_FILE) not in (None, made_with):
        raise CheckpointError(
            f"the latents of this run were made by another AR-VAE (weights {made_with[:16]}…) than the one of {bundle} "
            f"({str(digests[AR_VAE_FILE])[:16]}…)"
        )


def _sampler_defaults(commit: Commit, diffusion: DiffusionConfig) -> SamplerDefaults:
    """As many frames as the training clips had, and 50 steps where that divides the training timesteps."""
    changes: dict[str, Any] = {}
    shape = commit.state.get("dataset", {}).get("shape")
    if shape:
        changes["num_frames"] = int(shape[0])
    steps = next(count for count in range(50, 0, -1) if diffusion.num_timesteps % count == 0)
    return SamplerDefaults(num_inference_steps=steps, difference=max(1, steps // 10), **changes)


def _write_ar_vae(target: Path, config: ARVAEConfig, averaged: State, raw: State, provenance: dict[str, Any]) -> Path:
    model = ARVAE(config)
    load_into(model, averaged, "the checkpoint's averaged weights")
    with publish_directory(target, replaces=is_bundle) as directory:
        save_ar_vae(directory, model)
        written = read_config(directory)
        written["digests"][AR_VAE_RAW_FILE] = write_state(directory / AR_VAE_RAW_FILE, raw)
        write_config(directory, {**written, "provenance": provenance})
        opened = load_ar_vae(directory).state_dict()
        if any(not torch.equal(value, opened[name]) for name, value in model.state_dict().items()):
            raise CheckpointError(f"{target}: the bundle does not give back the weights that were written")
    return target
