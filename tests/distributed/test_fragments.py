"""Fragments of named parameters, EMA on them, and the numerics guard, for every ZeRO stage and number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy import gather, masters, same_state, state_of, toy_config, toy_engine, toy_step

from ardist.training.ema import ShardedEMA, warmed_decay

pytestmark = pytest.mark.distributed

LAYOUTS = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (3, 1), (3, 2)]


def _train(stage: int, steps: int) -> dict[str, Any]:
    engine = toy_engine(toy_config(zero_stage=stage))
    ema = ShardedEMA(engine.fragments, (0.9, 0.2))
    reference = {decay: masters(engine) for decay in (0.9, 0.2)}
    losses, norms = [], []
    for step in range(steps):
        loss, outcome = toy_step(engine, step)
        losses.append(loss)
        norms.append(float(outcome.grad_norm))
        ema.update(outcome.skipped)
        for decay, averages in reference.items():
            weight = 1.0 - warmed_decay(decay, step)
            for name, value in masters(engine).items():
                averages[name].lerp_(value, weight)
    sharded = {decay: gather(engine, ema.buffers[decay]) for decay in (0.9, 0.2)}
    equal = all(torch.equal(sharded[d][name], reference[d][name]) for d in reference for name in reference[d])
    return {"losses": losses, "norms": norms, "masters": masters(engine), "ema_equal": equal, "updates": ema.updates}


@pytest.fixture(scope="module")
def runs() -> dict[tuple[int, int], list[dict[str, Any]]]:
    return {layout: run_ranks(_train, layout[1], layout[0], 4) for layout in LAYOUTS}


def test_every_stage_and_rank_count_trains_alike(runs: dict[tuple[int, int], list[dict[str, Any]]]) -> None:
    first = runs[0, 1][0]
    assert first["losses"][-1] < first["losses"][0]
    for layout, ranks in runs.items():
        for result in ranks:
            assert result["losses"] == pytest.approx(first["losses"], abs=1e-6), layout
            assert result["norms"] == pytest.approx(first["norms"], rel=1e-5), layout
            for name, value in result["masters"].items():
                torch.testing.assert_close(value, first["masters"][name], atol=1e-5, rtol=0)


def test_sharded_ema_is_bit_equal_to_an_unsharded_one(runs: dict[tuple[int, int], list[dict[str, Any]]]) -> None:
    for layout, ranks in runs.items():
        assert all(result["ema_equal"] and result["updates"] == 4 for result in ranks), layout


def _poisoned(stage: int, guard: str, precision: str, rank: int) -> dict[str, Any]:
    engine = toy_engine(toy_config(zero_stage=stage, guard=guard, precision=precision))
    ema = ShardedEMA(engine.fragments, (0.9,))
    ema.update(toy_step(engine, 0)[1].skipped)
    before, ema_before, steps = masters(engine), gather(engine, ema.buffers[0.9]), engine.fragments.steps()
    _, outcome = toy_step(engine, 1, poison=engine.world.rank == rank)
    ema.update(outcome.skipped)
    after, ema_after = masters(engine), gather(engine, ema.buffers[0.9])
    unchanged = all(torch.equal(before[n], after[n]) and torch.equal(ema_before[n], ema_after[n]) for n in before)
    steps_kept = steps == engine.fragments.steps()
    loss, good = toy_step(engine, 2)
    ema.update(good.skipped)
    return {
        "skipped": float(outcome.skipped),
        "unchanged": unchanged and steps_kept,
        "norm": float(outcome.grad_norm),
        "good": float(good.skipped),
        "loss": loss,
        "updates": ema.updates,
    }


@pytest.mark.parametrize(
    ("stage", "guard", "precision"),
    [
        (0, "deepspeed", "fp32"),
        (1, "deepspeed", "fp32"),
        (1, "device", "fp32"),
        (2, "deepspeed", "bf16"),
        (2, "device", "bf16"),
        (3, "deepspeed", "fp32"),
    ],
)
def test_nan_on_one_rank_skips_the_step_on_all(stage: int, guard: str, precision: str) -> None:
    for result in run_ranks(_poisoned, 2, stage, guard, precision, 1):
        assert result["skipped"] == 1.0
        assert result["unchanged"]
        assert not result["norm"] < float("inf")
        assert result["good"] == 0.0
        assert result["loss"] < 10
        assert result["updates"] == 2


def _spiked(stage: int, guard: str, precision: str, policy: str) -> dict[str, Any]:
    spikes = {"spike_policy": policy, "spike_window": 3, "spike_sigmas": 20.0}
    engine = toy_engine(toy_config(zero_stage=stage, guard=guard, precision=precision, **spikes))
    ema = ShardedEMA(engine.fragments, (0.9,))
    flags = []
    for step in range(4):
        _, outcome = toy_step(engine, step)
        ema.update(outcome.skipped)
        flags.append((float(outcome.skipped), float(outcome.spike)))
    before, steps = state_of(engine, ema), engine.fragments.steps()
    _, outcome = toy_step(engine, 4, factor=1e4)
    ema.update(outcome.skipped)
    flags.append((float(outcome.skipped), float(outcome.spike)))
    unchanged = same_state(before, state_of(engine, ema)) and steps == engine.fragments.steps()
    _, outcome = toy_step(engine, 5)
    flags.append((float(outcome.skipped), float(outcome.spike)))
    return {"flags": flags, "unchanged": unchanged, "norm": float(outcome.grad_norm or 0), "updates": ema.updates}


@pytest.mark.parametrize(
    ("stage", "guard", "precision", "policy"),
    [
        (0, "deepspeed", "fp32", "skip"),
        (0, "deepspeed", "bf16", "skip"),
        (1, "deepspeed", "fp32", "skip"),
        (1, "deepspeed", "bf16", "skip"),
        (1, "device", "fp32", "count"),
        (2, "device", "bf16", "skip"),
        (2, "deepspeed", "fp32", "count"),
        (3, "deepspeed", "fp32", "skip"),
    ],
)
def test_a_gradient_spike_is_skipped_or_counted_on_all_ranks(
    stage: int, guard: str, precision: str, policy: str
) -> None:
    for result in run_ranks(_spiked, 2, stage, guard, precision, policy):
        skipped = float(policy == "skip")
        assert result["flags"] == [(0.0, 0.0)] * 4 + [(skipped, 1.0), (0.0, 0.0)]
        assert result["unchanged"] == (policy == "skip"), "weights, moments, step counts and averages"
        assert result["updates"] == (4 if policy == "skip" else 5)


def _exchange(stage: int, precision: str) -> dict[str, bool]:
    engine = toy_engine(toy_config(zero_stage=stage, precision=precision))
    ema = ShardedEMA(engine.fragments, (0.9,))
    for step in range(3):
        ema.update(toy_step(engine, step)[1].skipped)
    raw, average = masters(engine), gather(engine, ema.buffers[0.9])
    x, index = torch.randn(5, 7, generator=torch.Generator().manual_seed(5)).to(engine.dtype), torch.arange(5) % 3
    with torch.no_grad():
        output = engine(x, index)
        engine.fragments.exchange(ema.buffers[0.9])
        swapped, swapped_output = masters(engine), engine(x, index)
        everywhere = engine.world.all_gather(swapped_output.tolist())
        engine.fragments.exchange(ema.buffers[0.9])
        back = engine(x, index)
    return {
        "shows ema": all(torch.equal(swapped[name], average[name]) for name in average),
        "output moved": not torch.equal(output, swapped_output),
        "same on all ranks": all(everywhere[0] == other for other in everywhere),
        "restored": torch.equal(output, back) and all(torch.equal(v, raw[n]) for n, v in masters(engine).items()),
    }


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "fp32")])
def test_exchange_with_the_ema_and_back_is_exact(stage: int, precision: str) -> None:
    for result in run_ranks(_exchange, 2, stage, precision):
        assert all(result.values()), result
