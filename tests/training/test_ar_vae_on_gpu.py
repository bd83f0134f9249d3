"""Both stages of the AR-VAE on a real device: bf16, a discriminator, a stop and a resume, compilation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ar_vae_runs import ar_vae_config, stage_two, write_clips
from test_training_on_gpu import train_in_a_process
from tiny import losses

from ardist.config.loading import dump_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_both_stages_on_a_device(tmp_path: Path) -> None:
    data = write_clips(tmp_path / "data")
    bf16 = {"training__precision": "bf16", "training__steps": 12}
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    dump_config(ar_vae_config(tmp_path / "first", data, **bf16), first)
    assert train_in_a_process(first, "training.stop_after=5") == 75
    assert train_in_a_process(first) == 0
    assert train_in_a_process(first, f"run_dir={tmp_path / 'whole'}") == 0
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "whole"), abs=5e-3)
    assert train_in_a_process(first, f"run_dir={tmp_path / 'compiled'}", "training.compile=true") == 0
    assert losses(tmp_path / "compiled")[0] == pytest.approx(losses(tmp_path / "whole")[0], abs=1e-2)
    dump_config(stage_two(tmp_path / "second", data, tmp_path / "first", **bf16), second)
    assert train_in_a_process(second) == 0
    assert len(losses(tmp_path / "second")) == 12
