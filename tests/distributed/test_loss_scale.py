"""The loss scale of fp16 against DeepSpeed's own scalers; fp16 itself needs a GPU, so overflows are made in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler
from ranks import Ranks, run_ranks
from tiny import tiny_config, write_latents

from ardist.training.callbacks.base import Callback
from ardist.training.engine import StepOutcome
from ardist.training.loss_scale import LossScale
from ardist.training.trainer import Trainer, train

pytestmark = pytest.mark.distributed

ARGUMENTS: dict[str, Any] = {"init_scale": 8.0, "scale_window": 100, "min_scale": 1.0}


def dynamic() -> SimpleNamespace:
    """An optimiser of ZeRO 1 to 3, as far as its scale goes."""
    scaler = DynamicLossScaler(**ARGUMENTS, delayed_shift=1, consecutive_hysteresis=False)
    return SimpleNamespace(loss_scaler=scaler)


def settings() -> SimpleNamespace:
    """One of ZeRO 0."""
    return SimpleNamespace(loss_scale_config=LossScaleConfig(torch.float16, True, 1.0, ARGUMENTS))


@pytest.mark.parametrize("make", [dynamic, settings])
def test_state_goes_from_one_scaler_to_the_next(make: Any) -> None:
    optimizer = make()
    scale = LossScale(optimizer, "fp16")
    assert (scale.value, scale.can_fall) == (8.0, True)
    holder = next(iter(vars(optimizer).values()))
    holder.cur_scale, holder.cur_iter, holder.last_overflow_iter = 1.0, 40, 7
    assert not scale.can_fall
    other = LossScale(make(), "fp16")
    other.load_state(json.loads(json.dumps(scale.state())))
    assert other.state() == scale.state() | {"cur_scale": 1.0, "cur_iter": 40.0, "last_overflow_iter": 7.0}
    assert (other.value, other.can_fall) == (1.0, False)
    other.load_state({"cur_scale": 0.25})
    assert other.value == 0.25


def test_nothing_is_scaled_in_other_precisions_and_a_fixed_scale_cannot_fall() -> None:
    nothing = LossScale(dynamic(), "bf16")
    nothing.load_state({"cur_scale": 4.0})
    assert (nothing.value, nothing.can_fall, nothing.state()) == (None, False, {})
    assert not LossScale(SimpleNamespace(loss_scaler=LossScaler(scale=64.0)), "fp16").can_fall


class Overflows(Callback):
    """Lets DeepSpeed's scaler follow the steps, as an fp16 optimiser would."""

    def on_start(self, trainer: Trainer) -> None:
        optimizer = dynamic()
        trainer.engine.loss_scale = LossScale(optimizer, "fp16")
        step = trainer.engine.step

        def scaled(rate: float) -> StepOutcome:
            outcome = step(rate)
            optimizer.loss_scaler.update_scale(outcome.skipped)
            return outcome

        trainer.engine.step = scaled  # type: ignore[method-assign]


def train_with_overflows(config: Any) -> str:
    train(config, [Overflows()])
    return "done"


def test_overflows_lower_the_scale_to_its_floor_and_only_those_at_the_floor_end_a_run(tmp_path: Path) -> None:
    # Four micro-batches per step: visits 9 to 20 are the steps 3 to 5. The loss is finite, its gradient is not.
    fault = {"ARDIST_FAULT": ";".join(f"value@trainer.loss#{visit}:1e38" for visit in range(9, 21))}
    data = write_latents(tmp_path / "latents")
    config = tiny_config(tmp_path / "run", data, training__steps=6, training__max_skipped_in_row=2)
    assert [outcome.value for outcome in Ranks(train_with_overflows, 1, config, env=fault).wait()] == ["done"]
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["reason"], entry["loss_scale"]) for entry in listed] == [
        (3, "fp16 overflow", 4.0),
        (4, "fp16 overflow", 2.0),
        (5, "fp16 overflow", 1.0),
    ]
    events = json.loads((tmp_path / "run" / "summary.json").read_text())["events"]
    assert events["training.skipped_step"] == 3
    assert events["training.loss_scale_floor"] == 1


def _falls_to_its_floor() -> list[float | None]:
    from ardist.training import distributed

    distributed.start(1.0)
    deepspeed.init_distributed()
    optimizer = dynamic()
    scale = LossScale(optimizer, "fp16")
    seen = []
    for _ in range(5):
        optimizer.loss_scaler.update_scale(True)
        seen.append(scale.value)
    distributed.stop()
    return seen


def test_deepspeeds_exception_at_the_floor_is_off() -> None:
    assert run_ranks(_falls_to_its_floor, 1) == [[4.0, 2.0, 1.0, 1.0, 1.0]]
