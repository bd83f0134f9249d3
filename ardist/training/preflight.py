"""Everything that can be known before the process group exists is checked here, and told in one message."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ardist import fault
from ardist.config import TrainConfig, batch_layout
from ardist.data.batch_loader import buffer_bytes, buffer_rows
from ardist.data.buckets import bucket_batches, check_buckets
from ardist.data.manifest import Manifest, load_manifest
from ardist.data.order import check_layout
from ardist.errors import ArdistError, CheckpointError, ConfigError, DataError
from ardist.events import events
from ardist.models.ar_vae.discriminator import smallest_side
from ardist.models.ar_vae.losses import AutoencoderLoss
from ardist.models.ar_vae.perceptual import SMALLEST
from ardist.storage import is_remote
from ardist.training.callbacks.sampled_videos import samples_problems
from ardist.training.commit import Commit
from ardist.training.dataset import TrainingSet, paths
from ardist.training.deepspeed_overrides import override_problems
from ardist.training.distributed import environment, uses_gpu
from ardist.training.object_store import open_store
from ardist.training.optimizer import build_problem

_log = logging.getLogger("ardist.training")

DIFFUSION_IDENTITY = ("num_timesteps", "schedule", "target")
"""Settings of the diffusion that a checkpoint must share with the run that resumes it, as it must the model's."""

OTHER_TASKS_SECTIONS = {"denoiser": ("ar_vae", "ar_vae_loss", "augmentation"), "ar_vae": ("denoiser", "diffusion")}
"""Sections of a configuration that a task does not read."""


def check_run(config: TrainConfig, world_size: int, checkpoints: Path) -> TrainingSet:
    """Check a run against its data, its checkpoints and this machine; returns the training set.

    Raises `ConfigError` or, when only data is at fault, `DataError`, with every problem in one message.
    """
    try:
        fault.parse(os.environ.get(fault.VARIABLE, ""))
    except ValueError as error:  # alone: whatever is looked at next may hold a fault point
        raise ConfigError(str(error)) from None
    problems: list[str] = []
    data_problems: list[str] = []
    manifests = {path: _manifest(path, data_problems) for path in paths(config.data)}
    held_out = _manifest(config.validation.path, data_problems) if config.validation.path else None
    problems += _machine_problems(config)
    problems += _layout_problems(config, world_size, manifests)
    for path, manifest in manifests.items():
        if manifest is not None:
            problems += [f"data, {path!r}: {problem}" for problem in _shape_problems(config, manifest)]
    # Held-out clips fit the model, like the others; how many frames they have is their own affair.
    if held_out is not None:
        problems += [f"validation.path: {problem}" for problem in _shape_problems(config, held_out)]
    problems += override_problems(config.deepspeed)
    complete = tuple(manifest for manifest in manifests.values() if manifest is not None)
    data = TrainingSet(complete) if len(complete) == len(manifests) else None
    problems += _autoencoder_problems(manifests, held_out)
    problems += samples_problems(config, complete)
    problems += _checkpoint_problems(config, data, checkpoints)
    everything = problems + data_problems
    if data is not None and not everything:
        _announce(config, data, world_size)
        return data
    noun = "problem" if len(everything) == 1 else "problems"
    message = f"this run cannot start, {len(everything)} {noun}:\n" + "\n".join(f"  {line}" for line in everything)
    raise ConfigError(message) if problems else DataError(message)


def _announce(config: TrainConfig, data: TrainingSet, world_size: int) -> None:
    """Say once per run what is done otherwise than a reader of the configuration would think."""
    if environment()[0] != 0:
        return
    for name in OTHER_TASKS_SECTIONS[config.task]:
        # A resolved configuration gives every section; only one that says something is worth a word.
        if name in config.model_fields_set and getattr(config, name) != TrainConfig.model_fields[name].default:
            events.count("config.unused_section", section=name, task=config.task)
    micro, accumulation = batch_layout(config.training, world_size)
    if config.data.tokens_per_batch is not None:
        shown = (
            f"{batch // world_size // accumulation} clips of {one.shape[0]} frame{'s' if one.shape[0] > 1 else ''}"
            for batch, one in zip(_global_batches(config, data.manifests), data.manifests, strict=True)
        )
        _log.info(
            "%d micro-batches per step and rank, each of %s",
            accumulation,
            " or ".join(shown),
        )
    if micro != config.training.micro_batch_size:
        _log.info(
            "micro batches of %d clips instead of training.micro_batch_size=%d: a rank's %d clips of a step are cut "
            "into equal parts",
            micro,
            config.training.micro_batch_size,
            micro * accumulation,
        )


def _manifest(path: str, problems: list[str]) -> Manifest | None:
    try:
        return load_manifest(path)
    except ArdistError as error:
        problems.append(str(error))
        return None


def _machine_problems(config: TrainConfig) -> Iterator[str]:
    training = config.training
    if "://" in config.run_dir:
        yield f"run_dir: {config.run_dir!r} is no folder; legal: a folder that every machine of the run sees"
    if training.offload != "none" and (missing := build_problem()):
        yield f"training.offload: {training.offload} compiles DeepSpeed's Adam here, which needs {missing}; legal: none"
    if not uses_gpu() and training.precision == "fp16":
        yield "training.precision: fp16 needs a GPU; legal on a CPU: bf16, fp32"
    if training.compile and training.zero_stage == 3 and config.task == "ar_vae":
        yield "training.compile: the AR-VAE is compiled as a whole, which ZeRO-3 cuts into pieces; legal with 3: false"
    yield from _perceptual_problems(config)
    source = config.init_from
    if source is not None and not is_remote(source) and not Path(source).expanduser().is_dir():
        yield f"init_from: {config.init_from!r} is not a directory"


def _perceptual_problems(config: TrainConfig) -> Iterator[str]:
    """The files of the perceptual loss are there and undamaged, before every rank reads them."""
    if config.task == "ar_vae" and config.ar_vae_loss.perceptual == "lpips":
        try:
            AutoencoderLoss(config.ar_vae_loss)
        except CheckpointError as error:
            yield f"ar_vae_loss.perceptual: {error}"


def _layout_problems(config: TrainConfig, world_size: int, manifests: Mapping[str, Manifest | None]) -> Iterator[str]:
    known = {path: manifest for path, manifest in manifests.items() if manifest is not None}
    if config.data.tokens_per_batch is not None and len(known) < len(manifests):
        return  # what is missing decides the buckets
    data = tuple(known.values())
    try:
        batches = _global_batches(config, data)
    except ConfigError as error:
        yield str(error)
        return
    split = True
    try:
        _check_split(config, world_size, data, batches)
    except ConfigError as error:
        yield str(error)
        split = False
    for (path, manifest), batch in zip(known.items(), batches, strict=True):
        try:
            check_layout(manifest.num_samples, lanes=config.data.lanes, global_batch_size=batch)
        except ConfigError as error:
            yield f"data, {path!r}: {error}"
    if split and data:
        try:
            buffer_bytes(buffer_rows(data, batches, world_size), config.data.prefetch_bytes)
        except ConfigError as error:
            yield f"data: {error}"


def _global_batches(config: TrainConfig, data: Sequence[Manifest]) -> tuple[int, ...]:
    """The global batch of every dataset."""
    if config.data.tokens_per_batch is None:
        return (config.training.global_batch_size,) * len(data)
    return bucket_batches(data, config.data.tokens_per_batch, lanes=config.data.lanes)


def _check_split(config: TrainConfig, world_size: int, data: Sequence[Manifest], batches: Sequence[int]) -> None:
    """Every batch can be split over the ranks, and each rank's part into micro-batches."""
    training = config.training
    if config.data.tokens_per_batch is not None:
        check_buckets(
            data,
            batches,
            world_size=world_size,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
        )
        return
    try:
        batch_layout(training, world_size)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from None


def _shape_problems(config: TrainConfig, manifest: Manifest) -> Iterator[str]:
    wanted = "latents" if config.task == "denoiser" else "pixels"
    if manifest.kind != wanted:
        yield f"holds {manifest.kind}; task {config.task!r} trains on {wanted}"
        return
    if config.task == "denoiser":
        model = config.denoiser
        assert model is not None
        frames, tokens, channels = manifest.shape
        if (tokens, channels) != (model.tokens_per_frame, model.latent_channels):
            yield (
                f"holds latents of {tokens} tokens x {channels} channels per frame; the denoiser is configured for "
                f"tokens_per_frame={model.tokens_per_frame}, latent_channels={model.latent_channels}"
            )
        wanted_context = (model.context_tokens, model.context_dim) if model.context_tokens else None
        if wanted_context is not None and manifest.context_shape != wanted_context:
            has = "no context embeddings"
            if manifest.context_shape is not None:
                has = f"context embeddings of {manifest.context_shape[0]} tokens x {manifest.context_shape[1]} channels"
            yield (
                f"holds {has}; the denoiser is configured for context_tokens={model.context_tokens}, "
                f"context_dim={model.context_dim}"
            )
        if model.positions == "sincos" and frames > model.max_frames:
            yield f"holds clips of {frames} frames; denoiser.max_frames is {model.max_frames}"
        weights = config.diffusion.frame_weights
        if weights is not None and frames > len(weights):
            yield f"holds clips of {frames} frames; diffusion.frame_weights has {len(weights)} values"
        classes = len(manifest.classes or ())
        if model.num_classes is not None and classes > model.num_classes:
            yield f"has {classes} classes; denoiser.num_classes is {model.num_classes}"
        if model.num_classes is not None and not classes:
            yield "has no class labels; denoiser.num_classes must be null for it"
    else:
        autoencoder = config.ar_vae
        assert autoencoder is not None
        _, height, width, _ = manifest.shape
        if config.ar_vae_loss.perceptual == "lpips" and min(height, width) < SMALLEST:
            yield f"holds frames of {height}x{width}; ar_vae_loss.perceptual: lpips needs {SMALLEST}x{SMALLEST} or more"
        least = smallest_side(config.ar_vae_loss.discriminator_layers)
        if config.ar_vae_loss.adversarial_weight and min(height, width) < least:
            yield (
                f"holds frames of {height}x{width}; a discriminator of "
                f"{config.ar_vae_loss.discriminator_layers} layers needs {least}x{least} or more"
            )
        if height % autoencoder.patch_size or width % autoencoder.patch_size:
            yield f"holds frames of {height}x{width}; the AR-VAE needs multiples of patch_size={autoencoder.patch_size}"


def _autoencoder_problems(manifests: Mapping[str, Manifest | None], held_out: Manifest | None) -> Iterator[str]:
    """Latents of two autoencoders have nothing in common, whatever their shapes."""
    named = {f"data, {path!r}": manifest for path, manifest in manifests.items()} | {"validation.path": held_out}
    makers = {name: found.vae.weights_digest for name, found in named.items() if found is not None and found.vae}
    for name, digest in makers.items():
        first, wanted = next(iter(makers.items()))
        if digest != wanted:
            yield f"{name}: its latents are of the AR-VAE {digest[:12]}…, those of {first} of {wanted[:12]}…"


def _checkpoint_problems(config: TrainConfig, data: TrainingSet | None, checkpoints: Path) -> Iterator[str]:
    """A run whose newest readable commit is of another model or data order is refused before any start."""
    store = open_store(config.checkpoint, checkpoints)
    if environment()[0] == 0:
        store.check()
    for step in store.steps():
        try:
            commit = store.commit_of(step)
        except CheckpointError:
            continue  # the resume will say so, count it and take the one before
        yield from identity_problems(commit, config)
        yield from _order_problems(commit, config, data)
        return


def _order_problems(commit: Commit, config: TrainConfig, data: TrainingSet | None) -> Iterator[str]:
    """Differences in what fixes the order of the samples, of which a resumed run continues at its place."""
    state = commit.state.get("data", {})
    for name, mine in (("seed", config.seed), ("data.lanes", config.data.lanes), ("data.window", config.data.window)):
        saved = state.get(name.rpartition(".")[2], mine)
        if saved != mine:
            yield _other_run(name, f"{saved!r} -> {mine!r}", commit)
    if config.data.mixture and "weights" in state:
        ours = {"mixture": config.data.mixture_by, "weights": [part.weight for part in config.data.mixture]}
        if (saved := {name: state.get(name) for name in ours}) != ours:
            yield _other_run("data.mixture", f"{saved!r} -> {ours!r}", commit)
    if data is not None and commit.manifest_digest is not None and commit.manifest_digest != data.digest:
        details = f"dataset {commit.manifest_digest[:12]}… -> {data.digest[:12]}…"
        yield _other_run("data.mixture" if config.data.mixture else "data.path", details, commit)


def identity_problems(commit: Commit, config: TrainConfig) -> Iterator[str]:
    """Differences between a checkpoint's run and this one that make a resume meaningless."""
    ours, theirs = config.model_dump(mode="json"), commit.config
    if not theirs:
        return
    pairs = [(name, ours.get(name), theirs.get(name)) for name in ("task", config.task)]
    if config.task == "denoiser":
        pairs += [
            (f"diffusion.{name}", ours["diffusion"][name], theirs.get("diffusion", {}).get(name))
            for name in DIFFUSION_IDENTITY
        ]
    else:
        pairs += _autoencoder_pairs(ours, theirs)
    for name, mine, saved in pairs:
        if isinstance(mine, dict) and isinstance(saved, dict):
            changed = {key for key in {*mine, *saved} if mine.get(key) != saved.get(key)} - {"attention_backend"}
            if changed:
                details = ", ".join(f"{key} {saved.get(key)!r} -> {mine.get(key)!r}" for key in sorted(changed))
                yield _other_run(name, details, commit)
        elif mine != saved:
            yield _other_run(name, f"{saved!r} -> {mine!r}", commit)
    mine, saved = sorted(config.training.ema_decays), sorted(commit.ema_decays)
    if mine != saved:  # an average that begins in the middle of a run is another one, and one left out is lost
        yield _other_run("training.ema_decays", f"{saved} -> {mine}", commit)


def _autoencoder_pairs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What is trained, and the shape of the discriminator where both runs have one."""
    yield "trainable", ours["trainable"], theirs.get("trainable", "all")
    mine, saved = ours["ar_vae_loss"], theirs.get("ar_vae_loss", {})
    if mine["adversarial_weight"] and saved.get("adversarial_weight"):
        for name in ("discriminator_channels", "discriminator_layers"):
            yield f"ar_vae_loss.{name}", mine[name], saved[name]


def _other_run(name: str, details: str, commit: Commit) -> str:
    return (
        f"{name}: the run directory holds a checkpoint (step {commit.step}) of another configuration: {details}. "
        "Use another run_dir; to begin with those weights, set init_from"
    )
