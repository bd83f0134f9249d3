"""Denoisers that are told about their clips by context embeddings: the data set's reach the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import losses, tiny_config, train_outcome, write_latents

from ardist.config import TrainConfig
from ardist.data.loader import read_samples
from ardist.data.manifest import load_manifest
from ardist.training.objectives import DenoiserObjective

CONTEXT = (2, 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"), samples=16, context=CONTEXT)


def config(run_dir: Path, data: Path, **changes: Any) -> TrainConfig:
    return tiny_config(run_dir, data, denoiser__context_tokens=2, denoiser__context_dim=8, **changes)


def test_every_sample_brings_its_own_context(data: Path) -> None:
    batch = read_samples(data)
    assert batch.context is not None
    objective = DenoiserObjective(
        config(data, data, diffusion__condition_dropout=0.5), load_manifest(str(data)), torch.device("cpu")
    )
    inputs = objective.prepare(batch)
    torch.testing.assert_close(inputs["context"], batch.context.float(), rtol=0, atol=0)
    assert inputs["context_dropped"].any()
    assert not inputs["context_dropped"].all()


def test_a_run_learns_from_the_context(data: Path, tmp_path: Path) -> None:
    wrong = write_latents(tmp_path / "other", samples=16, context=(3, 8))
    changes: dict[str, Any] = {"training__steps": 3, "optimizer__lr": 0.01, "diffusion__condition_dropout": 0.0}
    dropped = {**changes, "diffusion__condition_dropout": 1.0}
    configs = [config(tmp_path / "told", data, **changes), config(tmp_path / "deaf", data, **dropped)]
    [outcomes] = run_ranks(_train_all, 1, [*configs, config(tmp_path / "wrong", wrong, **changes)])
    assert outcomes[:2] == ["done", "done"]
    assert "context embeddings of 3 tokens x 8 channels" in outcomes[2]
    assert losses(tmp_path / "told")[0] == losses(tmp_path / "deaf")[0], "a fresh network ignores its condition"
    assert losses(tmp_path / "told")[2] != losses(tmp_path / "deaf")[2]


def _train_all(configs: list[TrainConfig]) -> list[str]:
    return [train_outcome(config) for config in configs]
