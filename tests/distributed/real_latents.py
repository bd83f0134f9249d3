"""Latents of real clips, made as a user makes them: an AR-VAE's bundle and the data tools' command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from ardist.config import TrainConfig
from ardist.errors import DataError
from ardist.models.ar_vae import ARVAE, preset
from ardist.models.weights import save_ar_vae
from ardist.quickstart.clips import packaged_clips

REAL_TOKENS, REAL_BATCH = 8, 12
"""A batch that 1, 2, 3 and 4 ranks can split; few tokens, because several ranks share two cores."""


def build_real_latents(folder: Path) -> Path:
    """Clips of 4 frames of the packaged videos, encoded by an untrained tiny AR-VAE; skips where there are none."""
    try:
        videos = packaged_clips()[0].parent
    except DataError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    save_ar_vae(folder / "ar-vae", ARVAE(preset("tiny", tokens_per_frame=REAL_TOKENS)))
    words = ["--videos", videos, "--out", folder / "data", "--encoder", folder / "ar-vae", "--samples-per-shard", "32"]
    words += ["--num-frames", "4", "--size", "64", "--stride", "4", "--workers", "1", "--decoders", "2"]
    # In a process of its own: the ranks are forked from this one, which is to start no threads before.
    command = [sys.executable, "-m", "data_tools", "build", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "data"


def real_config(run_dir: Path, data: Path, **changes: Any) -> TrainConfig:
    """The ``tiny`` preset on those latents."""
    defaults: dict[str, Any] = {
        "denoiser": {"preset": "tiny", "tokens_per_frame": REAL_TOKENS},
        "training__steps": 50,
        "training__global_batch_size": REAL_BATCH,
        "training__micro_batch_size": 3,
        "optimizer__lr": 1e-3,
        "checkpoint__every": 20,
    }
    return tiny_config(run_dir, data, **{**defaults, **changes})
