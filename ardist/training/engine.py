"""The DeepSpeed engine: every one of its settings derived from our configuration, and one guarded optimiser step."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from ardist.config.training import TrainConfig, batch_layout
from ardist.errors import ConfigError
from ardist.training.distributed import World
from ardist.training.fragments import Fragments
from ardist.training.frozen import FrozenWeights
from ardist.training.gradients import accumulates_in_fp32, uses_device_guard
from ardist.training.guard import DeviceGuard, SpikeGuard
from ardist.training.loss_scale import LossScale
from ardist.training.optimizer import build_optimizer
from ardist.training.spikes import SpikeDetector, SpikeDetectors

_log = logging.getLogger("ardist.training")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def deepspeed_settings(config: TrainConfig, world_size: int, *, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a run; ``config.deepspeed`` is merged over it, section by section."""
    training = config.training
    micro, accumulation = batch_layout(training, world_size)
    guarded = uses_device_guard(config)
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.zero_stage:
        zero |= {"overlap_comm": cuda, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
        if training.zero_stage < 3:
            zero |= {"allgather_bucket_size": 50_000_000}
            if guarded:
                zero["compute_grad_norm"] = False
    if training.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if training.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    settings: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if guarded else config.optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its throughput timer waits for the device in every step; ours does not.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if training.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": not guarded}
        if accumulates_in_fp32(config, accumulation):
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    elif training.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return merge(settings, config.deepspeed)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


@dataclass(frozen=True)
class StepOutcome:
    """What one optimiser step did: global gradient norm before clipping, whether the update was skipped, and whether
    the norm was a spike.

    Each may still be a 0-dim tensor on the device; reading it there would make the host wait.
    """

    grad_norm: torch.Tensor | float | None
    skipped: torch.Tensor | bool
    spike: torch.Tensor | bool = False


class Engine:
    """A model under DeepSpeed: `forward`, `backward` for every micro-batch, then `step`."""

    def __init__(self, module: nn.Module, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.dtype = DTYPES[config.training.precision]
        self.settings = deepspeed_settings(config, world.size, cuda=world.device.type == "cuda")
        self.micro_batch_size, self.accumulation = batch_layout(config.training, world.size)
        module = module.to(world.device)
        frozen = FrozenWeights(module, rounded=self.dtype != torch.float32, main=world.is_main)
        optimizer = build_optimizer(module, config.optimizer, offload=config.training.offload != "none")
        _skip_shared_memory_build(world)
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                model_parameters=[p for p in module.parameters() if p.requires_grad],
                config=self.settings,
            )
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise ConfigError(f"DeepSpeed refuses this combination of settings: {error}") from error
        self.fragments = Fragments(self.deepspeed, world, frozen)
        self.fragments.prepare_fresh()
        self.fragments.self_check()
        self.loss_scale = LossScale(self.deepspeed.optimizer, config.training.precision)
        self.spikes = spike_detector(config, world)
        self.guard: DeviceGuard | None = None
        self.spike_guard: SpikeGuard | None = None
        if uses_device_guard(config):
            self.guard = DeviceGuard(self.fragments, config.optimizer.grad_clip, self.spikes)
        elif self.spikes is not None and self.spikes.skip:
            self.spike_guard = SpikeGuard(self.fragments, self.spikes)
        if config.training.compile:
            self.deepspeed.compile()

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        module: nn.Module = self.deepspeed.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, with DeepSpeed's hooks."""
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch; DeepSpeed divides by the number of accumulation steps."""
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro-batch; changes no weight

    def step(self, lr: float, veto: torch.Tensor | bool = False) -> StepOutcome:
        """Update the weights after the last micro-batch, unless the gradient is not finite on any rank, or is a spike
        and spikes are skipped, or there is a `veto` on every rank. Only the device guard can obey one: without it a
        veto is refused by `ValueError`, before anything is changed."""
        if self.guard is None and veto is not False:
            raise ValueError("Engine.step: a veto needs training.guard: device; DeepSpeed's own check knows none")
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = lr
        if self.guard is not None:
            norm, bad, spike = self.guard.arm(veto)
            self.deepspeed.step()
            return StepOutcome(norm, bad, spike)
        self.deepspeed.step()
        norm, applied = self.deepspeed.get_global_grad_norm(), self.deepspeed.was_step_applied()
        if not applied or self.spikes is None:
            return StepOutcome(norm, not applied)
        if self.spike_guard is None:
            return StepOutcome(norm, False, self.spikes.judge(norm))
        spike = self.spike_guard.verdict()
        return StepOutcome(norm, spike, spike)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the model."""
        self.deepspeed.train(mode)

    def counters(self) -> dict[str, int]:
        """DeepSpeed's own counters, which belong to the state of a run."""
        return {name: int(getattr(self.deepspeed, name)) for name in COUNTERS}

    def set_counters(self, counters: Mapping[str, int], step: int) -> None:
        """Restore them; micro steps are those of this layout, for the same number of optimiser steps."""
        for name in COUNTERS:
            setattr(self.deepspeed, name, int(counters.get(name, 0)))
        self.deepspeed.micro_steps = step * self.accumulation

    def save_settings(self, run_dir: Path) -> None:
        """Write the settings DeepSpeed was given to ``deepspeed.json`` of the run directory."""
        path = run_dir / "deepspeed.json"
        path.write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def spike_detector(config: TrainConfig, world: World) -> SpikeDetectors | None:
    """What tells gradient spikes, as ``training.spike_policy`` asks for; None where it is off."""
    training = config.training
    if training.spike_policy == "off":
        return None
    skips = training.spike_policy == "skip"
    return SpikeDetectors(
        lambda: SpikeDetector(training.spike_sigmas, training.spike_window, skip=skips, device=world.device)
    )


COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def _skip_shared_memory_build(world: World) -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce for most of a minute when gloo ranks start.

    The switch is a private table: where it is gone, the only loss is that minute.
    """
    if world.device.type == "cuda" or os.environ.get("ARDIST_DEEPSPEED_SHM"):
        return
    import deepspeed.ops

    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict) and "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False
