"""One checkpoint loads into every ZeRO stage and number of ranks, and training goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from ranks import run_ranks
from toy import Toy, masters, same_state, snapshot, state_of, toy_config, toy_engine, toy_step

from ardist.training import distributed, resume
from ardist.training.checkpoint import CheckpointWriter
from ardist.training.ema import ShardedEMA
from ardist.training.engine import Engine

pytestmark = pytest.mark.distributed

LAYOUTS = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2)]
SAVED_AT, END = 3, 6


def _steps(engine: Any, ema: ShardedEMA, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        loss, outcome = toy_step(engine, step)
        ema.update(outcome.skipped)
        losses.append(loss)
    return losses


def _source(root: Path, stage: int, precision: str, save_at: int) -> dict[str, Any]:
    engine = toy_engine(toy_config(zero_stage=stage, precision=precision))
    ema = ShardedEMA(engine.fragments, (0.9, 0.99))
    _steps(engine, ema, 0, save_at)
    writer = CheckpointWriter(root, engine.fragments, ema)
    writer.save(snapshot(save_at))
    saved = state_of(engine, ema)
    losses = _steps(engine, ema, save_at, END)  # while the thread writes
    writer.wait()
    assert writer.last_saved == save_at
    return {"saved": saved, "losses": losses, "end": state_of(engine, ema)}


def _destination(roots: dict[Any, Path], stage: int, precision: str) -> dict[Any, dict[str, Any]]:
    """Load every source in turn into one engine: the first time fresh, then over a trained one."""
    engine = toy_engine(toy_config(zero_stage=stage, precision=precision))
    ema = ShardedEMA(engine.fragments, (0.9, 0.99))
    results = {}
    for source, root in roots.items():
        found = resume.find(root, engine.world)
        assert found is not None
        path, commit = found
        resume.restore(path, commit, engine.fragments, ema)
        loaded = state_of(engine, ema)
        losses = _steps(engine, ema, commit.step, END)
        results[source] = {"loaded": loaded, "losses": losses, "end": masters(engine), "full": state_of(engine, ema)}
    return results


def _matrix(tmp_path: Path, layouts: list[tuple[int, int]], precision: str, save_at: int, tolerance: float) -> None:
    roots = {layout: tmp_path / f"stage{layout[0]}-ranks{layout[1]}" for layout in layouts}
    sources = {
        layout: run_ranks(_source, layout[1], roots[layout], layout[0], precision, save_at)[0] for layout in layouts
    }
    for destination in layouts:
        for results in run_ranks(_destination, destination[1], roots, destination[0], precision):
            for source, result in results.items():
                expected = sources[source]
                assert same_state(result["loaded"], expected["saved"]), (source, destination)
                assert result["losses"] == pytest.approx(expected["losses"], abs=tolerance), (source, destination)
                if source == destination:
                    assert result["losses"] == expected["losses"]
                    assert same_state(result["full"], expected["end"]), source


def test_every_layout_resumes_every_layout_in_fp32(tmp_path: Path) -> None:
    _matrix(tmp_path, LAYOUTS, "fp32", SAVED_AT, 1e-6)


def test_bf16_layouts_with_gradients_added_in_fp32(tmp_path: Path) -> None:
    _matrix(tmp_path, [(0, 2), (1, 1), (1, 2), (2, 2), (3, 2)], "bf16", SAVED_AT, 5e-3)


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    _matrix(tmp_path, [(0, 1), (1, 2), (3, 2)], "fp32", 0, 1e-6)


@pytest.mark.slow
def test_three_and_four_ranks(tmp_path: Path) -> None:
    _matrix(tmp_path, [(0, 3), (1, 4), (2, 3), (3, 4), (3, 2)], "fp32", SAVED_AT, 1e-6)


class PartlyFrozen(Toy):
    """A toy whose first layer is not trained and which has a buffer."""

    scale: torch.Tensor

    def __init__(self, frozen: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((5,), frozen))
        torch.nn.init.constant_(self.first.weight, frozen)
        self.first.requires_grad_(False)


def _frozen(root: Path, stage: int, value: float, save: bool) -> tuple[list[float], list[float]]:
    world = distributed.start()
    torch.manual_seed(0)
    engine = Engine(PartlyFrozen(value), toy_config(zero_stage=stage), world)
    toy_step(engine, 0)
    if save:
        CheckpointWriter(root, engine.fragments, None).save(snapshot(1), wait=True)
    else:
        found = resume.find(root, world)
        assert found is not None
        resume.restore(*found, engine.fragments, None)
    module: Any = engine.module
    with GatheredParameters([module.first.weight], enabled=stage == 3):
        return sorted(set(module.first.weight.flatten().tolist())), module.scale.tolist()


@pytest.mark.parametrize(("source", "destination"), [((3, 2), (1, 1)), ((1, 2), (3, 2)), ((0, 1), (2, 2))])
def test_frozen_parameters_and_buffers_travel_too(
    tmp_path: Path, source: tuple[int, int], destination: tuple[int, int]
) -> None:
    run_ranks(_frozen, source[1], tmp_path, source[0], 0.25, True)
    for values, scale in run_ranks(_frozen, destination[1], tmp_path, destination[0], 0.75, False):
        assert (values, scale) == ([0.25], [0.25] * 5)


def _weights_only(root: Path, kind: str) -> dict[str, Any]:
    engine = toy_engine(toy_config(zero_stage=2))
    ema = ShardedEMA(engine.fragments, (0.9, 0.99))
    _steps(engine, ema, 0, 2)
    found = resume.find(root, engine.world)
    assert found is not None
    resume.load_weights(*found, engine.fragments, kind)
    return masters(engine)


@pytest.mark.parametrize("kind", ["master", "ema_0.99"])
def test_weights_only_from_raw_or_ema(tmp_path: Path, kind: str) -> None:
    source = run_ranks(_source, 1, tmp_path, 3, "fp32", SAVED_AT)[0]
    for result in run_ranks(_weights_only, 2, tmp_path, kind):
        assert same_state({"w": result}, {"w": source["saved"][kind]})
