"""A small model, configuration and data for tests of the engine, fragments and checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ardist.config import TrainConfig
from ardist.training import distributed
from ardist.training.checkpoint import Snapshot
from ardist.training.ema import ShardedEMA
from ardist.training.engine import Engine, StepOutcome
from ardist.training.fragments import MOMENTS


class Toy(nn.Module):
    """Two layers with a norm, an embedding-like table and an odd number of elements here and there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 7) * 0.1)
        self.first = nn.Linear(7, 33)
        self.norm = nn.LayerNorm(33)
        self.second = nn.Linear(33, 7)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x = x + self.table[index]
        y: torch.Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


def toy_config(run_dir: Path | str = "unused", **training: Any) -> TrainConfig:
    """A run of the toy: global batch 12, accumulation 2 on two ranks."""
    defaults: dict[str, Any] = {
        "steps": 8,
        "global_batch_size": 12,
        "micro_batch_size": 3,
        "precision": "fp32",
        "ema_decays": (0.9, 0.99),
    }
    optimizer = {"lr": 1e-2, "weight_decay": 0.1, "grad_clip": 0.2}  # always active
    return TrainConfig.model_validate(
        {
            "task": "denoiser",
            "run_dir": str(run_dir),
            "denoiser": {"preset": "tiny"},
            "data": {"path": "unused", "lanes": 4},
            "optimizer": optimizer,
            "training": {**defaults, **training},
        }
    )


def toy_engine(config: TrainConfig) -> Engine:
    """An engine around the toy, its weights a function of nothing."""
    world = distributed.start()
    torch.manual_seed(0)
    return Engine(Toy(), config, world)


def toy_step(engine: Engine, step: int, *, poison: bool = False, factor: float = 1.0) -> tuple[float, StepOutcome]:
    """One optimiser step on the global batch number `step`; returns its mean loss over all ranks and the outcome."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = engine.config.training.global_batch_size
    x = torch.randn(size, 7, generator=generator)
    y = x.flip(1) * 0.5
    index = torch.randint(0, 3, (size,), generator=generator)
    per_rank = size // engine.world.size
    low = engine.world.rank * per_rank
    losses = []
    for micro in range(engine.accumulation):
        rows = slice(low + micro * engine.micro_batch_size, low + (micro + 1) * engine.micro_batch_size)
        output = engine(x[rows].to(engine.dtype), index[rows])
        loss = (output.float() - y[rows]).square().mean()
        if poison and micro == 0:
            loss = loss * float("nan")
        if factor != 1.0:
            loss = loss * factor
        engine.backward(loss)
        losses.append(loss.detach())
    outcome = engine.step(lr=1e-2)
    return float(engine.world.mean(torch.stack(losses).mean())), outcome


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """The full fp32 master weights on every rank."""
    return gather(engine, [engine.fragments.master(run) for run in engine.fragments.owned])


def gather(engine: Engine, stretches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full tensors of every parameter from tensors laid out like the owned runs."""
    full = {name: torch.zeros(math.prod(shape)) for name, shape in engine.fragments.shapes.items()}
    for run, stretch in zip(engine.fragments.owned, stretches, strict=True):
        for name, start, length, offset in run.fragments:
            full[name][start : start + length] = stretch[offset : offset + length]
    for values in full.values():
        torch.distributed.all_reduce(values)  # every element lies on one rank only, so the sum is exact
    return full


def snapshot(step: int) -> Snapshot:
    """A snapshot with no configuration and a recognisable state."""
    return Snapshot(step, config={}, config_digest="0", manifest_digest=None, state={"data": {"consumed": step * 12}})


def state_of(engine: Engine, ema: ShardedEMA) -> dict[str, dict[str, torch.Tensor]]:
    """Everything that a checkpoint must bring back, gathered."""
    runs = engine.fragments.owned
    state = {"master": masters(engine)}
    if engine.fragments.has_moments():
        for kind in MOMENTS:
            state[kind] = gather(engine, [engine.fragments.moment(run, kind) for run in runs])
    for decay, buffers in ema.buffers.items():
        state[f"ema_{decay:g}"] = gather(engine, buffers)
    return state


def same_state(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Bit equality of two gathered states."""
    return a.keys() == b.keys() and all(torch.equal(a[kind][name], b[kind][name]) for kind in a for name in a[kind])
