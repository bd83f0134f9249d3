"""One process can train one run after another."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks
from tiny import tiny_config, train_outcome, write_latents

from ardist.config import TrainConfig


def _train_all(configs: list[TrainConfig]) -> list[str]:
    return [train_outcome(config) for config in configs]


def test_one_process_trains_twice(tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data", samples=16)
    configs = [tiny_config(tmp_path / name, data, training__steps=1) for name in ("first", "second")]
    [outcomes] = run_ranks(_train_all, 1, configs)
    assert outcomes == ["done", "done"]
