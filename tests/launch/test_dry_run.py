"""The dry run before step 1: it meets what is too large, and leaves no trace in what is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, run_ranks
from tiny import losses, tiny_config, train_outcome, weights, write_latents

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def config_of(run_dir: Path, data: Path, **changes: Any) -> Any:
    return tiny_config(run_dir, data, **{"training__steps": 3, **changes})


@pytest.mark.parametrize("changes", [{"zero_stage": 1}, {"zero_stage": 3}, {"activation_checkpointing": "full"}])
def test_nothing_that_is_learned_changes(tmp_path: Path, data: Path, changes: dict[str, Any]) -> None:
    settings = {f"training__{name}": value for name, value in changes.items()}
    for name, wanted in (("with", True), ("without", False)):
        config = config_of(tmp_path / name, data, training__dry_run=wanted, **settings)
        assert run_ranks(train_outcome, 2, config) == ["done", "done"]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    mine, theirs = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def too_large(config: Any) -> str:
    from ardist.training import dry_run

    def no_memory(*words: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 7 EiB")

    dry_run._forward_and_backward = no_memory
    return train_outcome(config)


def test_what_does_not_fit_is_named_with_what_to_do(tmp_path: Path, data: Path) -> None:
    [outcome] = run_ranks(too_large, 1, config_of(tmp_path, data))
    assert outcome.startswith(
        "HardwareError: a micro-batch of 2 clips of 4 frames does not fit into the memory of rank 0"
    )
    assert "ardist plan" in outcome
    assert not (tmp_path / "metrics.jsonl").exists(), "no step was made"


def shapes_seen(config: Any) -> list[int]:
    from ardist.training import dry_run

    seen = []
    real = dry_run._forward_and_backward

    def watched(trainer: Any, batch: Any) -> None:
        seen.append(batch.values.shape[1])
        real(trainer, batch)

    dry_run._forward_and_backward = watched
    assert train_outcome(config) == "done"
    return seen


def test_of_a_mixture_the_longest_clips_are_taken(tmp_path: Path, data: Path) -> None:
    longer = write_latents(tmp_path / "longer", frames=6, seed=1)
    mixture = [{"path": str(data), "weight": 1}, {"path": str(longer), "weight": 1}]
    config = config_of(tmp_path / "run", data, data__path="", data__mixture=mixture, data__mixture_by="step")
    assert run_ranks(shapes_seen, 1, config) == [[6]]


def test_a_killed_dry_run_leaves_a_run_that_starts(tmp_path: Path, data: Path) -> None:
    killed = Ranks(train_outcome, 2, config_of(tmp_path, data), env={"ARDIST_FAULT": "kill@dry_run.memory/1"})
    assert killed.wait(60)[1].exit_code == -9
    assert run_ranks(train_outcome, 2, config_of(tmp_path, data)) == ["done", "done"]
