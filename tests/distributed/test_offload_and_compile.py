"""State on the host and compiled models change where and how fast a step is made, not what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, run_ranks
from tiny import losses, sample_ids, settings, tiny_config, train_outcome, write_latents

from ardist.config.training import OptimizerConfig
from ardist.errors import ConfigError
from ardist.training import optimizer
from ardist.training.preflight import check_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def config_of(run_dir: Path, data: Path, **changes: Any) -> Any:
    return tiny_config(run_dir, data, **{"training__steps": STEPS, **changes})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("plain")
    assert run_ranks(train_outcome, 2, config_of(run_dir, data)) == ["done", "done"]
    return run_dir


@pytest.fixture(scope="module")
def cpu_adam() -> None:
    """DeepSpeed's Adam compiled once, in the process that the ranks are forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        optimizer.build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(), offload=True)


@pytest.mark.parametrize(("offload", "stage", "then"), [("optimizer", 2, 1), ("parameters", 3, 2)])
def test_offload_trains_alike_and_its_checkpoints_load_anywhere(
    tmp_path: Path, data: Path, plain: Path, cpu_adam: None, offload: str, stage: int, then: int
) -> None:
    on_host = {"training__offload": offload, "training__zero_stage": stage}
    for changes in ({**on_host, "training__stop_after": 2}, {**on_host, "training__stop_after": 4}):
        outcomes = run_ranks(train_outcome, 2, config_of(tmp_path, data, **changes), timeout=900)
        assert all(outcome.startswith("Preempted") for outcome in outcomes), outcomes
    assert run_ranks(train_outcome, 2, config_of(tmp_path, data, training__zero_stage=then)) == ["done", "done"]
    assert sample_ids(tmp_path) == sample_ids(plain)
    assert losses(tmp_path) == pytest.approx(losses(plain), abs=1e-5)


def test_an_adam_that_cannot_be_built_is_said(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, data, training__offload="optimizer", training__zero_stage=2)
    [outcome] = Ranks(train_outcome, 1, config, env={"ARDIST_FAULT": "raise@optimizer.build:2"}).wait()
    assert outcome.value.startswith("HardwareError: training.offload: DeepSpeed's Adam for the CPU could not be built")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert str(optimizer.build_problem()) == "a C++ compiler (/no/such/compiler)"
    with pytest.raises(ConfigError, match="training.offload: optimizer compiles DeepSpeed's Adam here"):
        check_run(config, 1, tmp_path / "checkpoints")


def test_a_compiled_model_trains_alike_under_the_engine(tmp_path: Path, data: Path) -> None:
    # In processes of their own: run-time checks of shapes, which tests switch on, and the compiler do not mix.
    curves = {}
    for name in ("eager", "compiled"):
        config = tmp_path / f"{name}.json"
        changes = {"training__compile": name == "compiled", "training__steps": 4}
        config.write_text(json.dumps(settings(tmp_path / name, data, **changes)))
        command = [sys.executable, "-m", "ardist.training.main", str(config)]
        assert subprocess.run(command, check=False, timeout=900).returncode == 0
        curves[name] = losses(tmp_path / name)
    assert len(curves["compiled"]) == 4
    assert curves["compiled"] == pytest.approx(curves["eager"], abs=1e-5)
