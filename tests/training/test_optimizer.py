"""Learning-rate schedules and parameter groups."""

from __future__ import annotations

from typing import Any

import pytest

from ardist.config.training import OptimizerConfig
from ardist.models.denoiser import Denoiser, preset
from ardist.training.optimizer import learning_rate, parameter_groups


def rates(steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_constant_with_warmup() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_peak_towards_the_final_fraction() -> None:
    values = rates(100, schedule="cosine", warmup_steps=10, final_lr_fraction=0.1)
    assert values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.55)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0.1 < values[-1] < 0.11


def test_wsd_holds_and_then_falls_in_a_line_without_ever_wasting_a_step() -> None:
    assert rates(6, schedule="wsd", decay_steps=4) == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    model = Denoiser(preset("tiny", num_classes=3, context_tokens=2, context_dim=4))
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed_names | plain_names == set(names.values())
    assert not decayed_names & plain_names
    assert all(name.endswith("weight") for name in decayed_names)
    assert {"classes.weight", "context.null", "input.bias"} <= plain_names
    assert {"input.weight", "output.weight"} <= decayed_names
