"""The trainer with `training.compile` and recomputed activations: the same losses as without, both stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ar_vae_runs import ar_vae_config, stage_two, write_clips
from tiny import losses

from ardist.config import TrainConfig
from ardist.config.loading import dump_config


def train(config: TrainConfig, path: Path) -> list[float]:
    """In a process of its own, because the shape checks of the tests wrap every annotated class in Python."""
    dump_config(config, path)
    command = [sys.executable, "-m", "ardist.training.main", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(Path(config.run_dir))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_training_has_the_same_losses(tmp_path: Path) -> None:
    data = write_clips(tmp_path / "data", samples=16)
    plain = train(ar_vae_config(tmp_path / "plain", data, training__steps=3), tmp_path / "plain.yaml")
    options = {"training__compile": True, "training__activation_checkpointing": "full", "training__steps": 3}
    compiled = train(ar_vae_config(tmp_path / "compiled", data, **options), tmp_path / "compiled.yaml")
    assert compiled == pytest.approx(plain, abs=1e-4)
    clips = stage_two(tmp_path / "two", data, tmp_path / "plain", **options)
    assert len(train(clips, tmp_path / "two.yaml")) == 3
