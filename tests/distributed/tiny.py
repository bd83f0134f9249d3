"""A tiny data set of latents with structure, and the configuration of a denoiser small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ardist.config import TrainConfig
from ardist.data.manifest import VAEIdentity, fold_shards, write_manifest
from ardist.data.sample import SampleInfo, sample_key
from ardist.data.shard_writer import Sample, write_shard
from ardist.errors import ArdistError
from ardist.training.commit import newest_valid
from ardist.training.parts import EXTRA_FILE, PartsReader
from ardist.training.trainer import train

FRAMES, TOKENS, CHANNELS = 4, 3, 4


def write_latents(
    directory: Path,
    samples: int = 64,
    shards: int = 4,
    seed: int = 0,
    classes: int = 0,
    frames: int = FRAMES,
    context: tuple[int, int] | None = None,
) -> Path:
    """Clips of unit-norm tokens that turn slowly over time: something that can be learned.

    `context`: (K, D) of embeddings that say which way a clip turns.
    """
    generator = np.random.default_rng(seed)
    entries = []
    per_shard = samples // shards
    for shard in range(shards):
        items = []
        for index in range(per_shard):
            number = shard * per_shard + index
            start = generator.normal(size=(1, TOKENS, CHANNELS)) * 0.3 + np.eye(CHANNELS)[:TOKENS]
            turn = generator.normal(size=(1, TOKENS, CHANNELS)) * 0.1
            clip = start + turn * np.arange(frames)[:, None, None]
            clip /= np.linalg.norm(clip, axis=-1, keepdims=True)
            info = SampleInfo(
                source=f"clip-{number}.mp4", frames=frames, class_id=number % classes if classes else None
            )
            key = sample_key(f"{seed}-clip-{number}.mp4", (0, frames), {})
            told = None if context is None else np.resize(turn * 10, context).astype("<f2")
            items.append(Sample(key, clip.astype("<f2"), info, told))
        entries.append(write_shard(directory, shard, items, "float16"))
    manifest = fold_shards(
        entries,
        dataset_id="tiny",
        created="2026-01-01T00:00:00Z",
        code_version="test",
        kind="latents",
        vae=VAEIdentity(weights_digest="0" * 64, config_digest="1" * 64),
        classes=tuple(f"class-{index}" for index in range(classes)) if classes else None,
    )
    write_manifest(directory, manifest)
    return directory


def write_pixels(directory: Path, samples: int = 32, shards: int = 4, size: int = 16, seed: int = 0) -> Path:
    """Single frames with a bright square somewhere."""
    generator = np.random.default_rng(seed)
    entries = []
    per_shard = samples // shards
    for shard in range(shards):
        items = []
        for index in range(per_shard):
            number = shard * per_shard + index
            frame = np.full((1, size, size, 3), 40, np.uint8)
            y, x = generator.integers(0, size - 6, size=2)
            frame[:, y : y + 6, x : x + 6] = generator.integers(150, 255, size=3)
            info = SampleInfo(source=f"frame-{number}.mp4", frames=1)
            items.append(Sample(sample_key(f"{seed}-frame-{number}", (0, 1), {}), frame, info))
        entries.append(write_shard(directory, shard, items, "uint8"))
    manifest = fold_shards(
        entries, dataset_id="frames", created="2026-01-01T00:00:00Z", code_version="test", kind="pixels"
    )
    write_manifest(directory, manifest)
    return directory


def settings(run_dir: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Plain settings of a tiny denoiser run; `changes` are dotted keys with ``__`` for the dot."""
    values: dict[str, Any] = {
        "task": "denoiser",
        "run_dir": str(run_dir),
        "denoiser": {"width": 32, "depth": 2, "num_heads": 2, "tokens_per_frame": TOKENS, "latent_channels": CHANNELS},
        "data": {"path": str(data), "lanes": 4, "window": 8, "fetch_threads": 1},
        "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 2},
        "training": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "log_every": 1,
            "ema_decays": [0.9],
        },
        "checkpoint": {"every": 7},
        "tracking": {"wandb": "disabled"},
        "debug": {"log_sample_ids": True},
    }
    return changed(values, changes)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set what `changes` names by dotted keys with ``__`` for the dot."""
    for dotted, value in changes.items():
        node = values
        *path, last = dotted.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return values


def tiny_config(run_dir: Path, data: Path, **changes: Any) -> TrainConfig:
    """A checked configuration of a tiny denoiser run."""
    return TrainConfig.model_validate(settings(run_dir, data, **changes))


def train_outcome(config: TrainConfig) -> str:
    """Train on this rank and say how it ended: ``done``, ``Preempted: ...`` or another error's name and text."""
    try:
        train(config)
    except ArdistError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def records(run_dir: Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    """The latest record of every step of metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for line in lines if (record := json.loads(line))["kind"] == kind}


def losses(run_dir: Path) -> list[float]:
    """The loss of every step."""
    return [record["loss"] for _, record in sorted(records(run_dir).items())]


def sample_ids(run_dir: Path) -> dict[int, list[str]]:
    """The sorted sample ids of every step over all ranks, as the latest session logged them."""
    by_rank: dict[tuple[int, str], list[str]] = {}
    sizes: dict[int, int] = {}
    for path in sorted((run_dir / "logs").glob("samples-rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            by_rank[entry["step"], path.name] = entry["ids"]
            sizes[entry["step"]] = len(entry["ids"])
    steps: dict[int, list[str]] = {}
    for (step, _), ids in by_rank.items():
        steps.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in steps.items()}


def weights(run_dir: Path, kind: str = "master", step: int | None = None) -> dict[str, torch.Tensor]:
    """All parameters of the newest (or one) checkpoint."""
    path, commit = newest_valid(run_dir / "checkpoints", step)
    files = [part.file for part in commit.parts if part.file != EXTRA_FILE]
    reader = PartsReader(path, files, commit.shapes)
    return {name: reader.full(kind, name) for name in commit.shapes}
