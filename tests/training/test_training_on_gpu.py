"""Training on a real device: bf16, background checkpoints from pinned buffers, a stop and a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import losses, records, settings, write_latents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train_in_a_process(config: Path, *overrides: str) -> int:
    """One rank in a process of its own, on the device whatever the test session is set to."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "ardist.training.main", str(config), *overrides]
    return subprocess.run(command, env=environment, check=False, timeout=280).returncode


@pytest.mark.parametrize(("stage", "guard"), [(0, "deepspeed"), (1, "deepspeed"), (1, "device"), (3, "deepspeed")])
def test_stop_and_resume_on_a_device(tmp_path: Path, stage: int, guard: str) -> None:
    data = write_latents(tmp_path / "data")
    changes = {"training__precision": "bf16", "training__zero_stage": stage, "training__guard": guard}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(tmp_path / "run", data, **changes)))
    whole = tmp_path / "whole"
    assert train_in_a_process(config, f"run_dir={whole}") == 0
    assert train_in_a_process(config, "training.stop_after=9") == 75
    assert train_in_a_process(config) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=2e-3)
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    assert records(whole)[20]["memory_gib"] > 0


SYNC_PROGRAM = """
import json, sys, warnings
import torch
from ardist.config import TrainConfig, load_config
from ardist.training.callbacks import Callback
from ardist.training.trainer import train

class Watch(Callback):
    def after_step(self, trainer):
        if trainer.step == 2:
            self.catch = warnings.catch_warnings(record=True)
            self.seen = self.catch.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if trainer.step == 6:
            torch.cuda.set_sync_debug_mode("default")
            self.catch.__exit__(None, None, None)

watch = Watch()
train(load_config(TrainConfig, sys.argv[1]), [watch])
print(json.dumps([[w.filename, w.lineno] for w in watch.seen if "synchroniz" in str(w.message)]))
"""


@pytest.mark.parametrize(("stage", "guard", "policy"), [(1, "device", "skip"), (1, "deepspeed", "count")])
def test_the_loop_itself_never_waits_for_the_device(tmp_path: Path, stage: int, guard: str, policy: str) -> None:
    """Between log points; what DeepSpeed reads for its own check is DeepSpeed's."""
    changes = {"training__precision": "bf16", "training__zero_stage": stage, "training__guard": guard}
    changes |= {"training__log_every": 100, "training__steps": 8, "debug__log_sample_ids": False}
    changes |= {"training__spike_policy": policy, "checkpoint__every": 100}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(tmp_path / "run", write_latents(tmp_path / "data"), **changes)))
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", SYNC_PROGRAM, str(config)]
    done = subprocess.run(command, env=environment, check=True, timeout=280, capture_output=True, text=True)
    places = json.loads(done.stdout.splitlines()[-1])
    assert [place for place in places if "/ardist/" in place[0]] == []
    if guard == "device":
        assert places == []
