"""Clips of a moving square and the configuration of an AR-VAE small enough for tests, both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny import changed, settings

from ardist.config import TrainConfig
from ardist.data.manifest import fold_shards, write_manifest
from ardist.data.sample import SampleInfo, sample_key
from ardist.data.shard_writer import Sample, write_shard

SIZE = 16
MODEL = {
    "preset": "tiny",
    "image_size": SIZE,
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "tokens_per_frame": 4,
    "codebook_size": 16,
    "codebook_dim": 8,
}
ADVERSARY = {"adversarial_weight": 0.5, "adversarial_start": 0, "discriminator_channels": 4, "discriminator_layers": 1}


def write_clips(directory: Path, samples: int = 32, frames: int = 3, size: int = SIZE, seed: int = 0) -> Path:
    """Clips in which a bright square moves over a grey ground."""
    generator = np.random.default_rng(seed)
    entries = []
    for shard in range(4):
        items = []
        for number in range(shard * samples // 4, (shard + 1) * samples // 4):
            clip = np.full((frames, size, size, 3), generator.integers(20, 90), np.uint8)
            colour = generator.integers(150, 255, size=3)
            y, x = generator.integers(0, size - 7, size=2)
            for frame in range(frames):
                clip[frame, y + frame % 2 : y + 6 + frame % 2, x + frame % 3 : x + 6 + frame % 3] = colour
            info = SampleInfo(source=f"clip-{number}.mp4", frames=frames)
            items.append(Sample(sample_key(f"{seed}-{number}", (0, frames), {}), clip, info))
        entries.append(write_shard(directory, shard, items, "uint8"))
    manifest = fold_shards(
        entries, dataset_id="clips", created="2026-01-01T00:00:00Z", code_version="test", kind="pixels"
    )
    write_manifest(directory, manifest)
    return directory


def ar_vae_settings(run_dir: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Plain settings of a tiny stage-1 run with a discriminator from the first step; `changes` as in `settings`."""
    values = settings(run_dir, data)
    del values["denoiser"]
    values |= {"task": "ar_vae", "ar_vae": dict(MODEL), "ar_vae_loss": dict(ADVERSARY)}
    return changed(values, changes)


def ar_vae_config(run_dir: Path, data: Path, **changes: Any) -> TrainConfig:
    """A checked configuration of such a run."""
    return TrainConfig.model_validate(ar_vae_settings(run_dir, data, **changes))


def stage_two(run_dir: Path, data: Path, stage_one: Path, **changes: Any) -> TrainConfig:
    """Stage 2 from `stage_one`: the temporal blocks only, without a discriminator."""
    return ar_vae_config(
        run_dir,
        data,
        **{
            "ar_vae__temporal": True,
            "trainable": "temporal",
            "init_from": str(stage_one),
            "ar_vae_loss": {},
            **changes,
        },
    )
