"""AdamW, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
import shutil
from subprocess import SubprocessError
from typing import Any

import torch
from torch import nn

from ardist import fault
from ardist.config.training import OptimizerConfig
from ardist.errors import HardwareError

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with weight decay; norms, biases and embeddings without.

    A parameter decays when it is a ``weight`` of at least two dimensions that belongs to neither a norm nor an
    embedding; learned tokens, tables and null embeddings, held by a module directly, do not.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_matrix = parameter.ndim >= 2 and (name == "weight" or name.endswith("_weight"))
            groups[is_matrix and not isinstance(owner, (nn.Embedding, *_NORMS))].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def build_optimizer(module: nn.Module, config: OptimizerConfig, *, offload: bool = False) -> torch.optim.Optimizer:
    """Fused AdamW over `parameter_groups`; DeepSpeed's CPU Adam when the optimiser state lives in host memory."""
    groups = parameter_groups(module, config.weight_decay)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if offload:
        return _cpu_adam(groups, settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _cpu_adam(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's Adam on the host, which it compiles at first use on a machine."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        fault.point("optimizer.build")
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise HardwareError(
            f"training.offload: DeepSpeed's Adam for the CPU could not be built on this machine: "
            f"{type(error).__name__}: {first}. Install a C++ compiler and ninja, or set training.offload: none"
        ) from error
    return optimizer


def build_problem() -> str | None:
    """Why an optimiser on the host cannot be built here, as far as that shows without trying; else None."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    missing = [] if is_ninja_available() else ["ninja"]
    missing += [] if shutil.which(get_cxx_compiler()) else [f"a C++ compiler ({get_cxx_compiler()})"]
    return " and ".join(missing) or None


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of `total_steps`.

    A linear warm-up over ``warmup_steps`` multiplies the schedule: ``constant``; ``cosine`` falls from the end of the
    warm-up towards ``final_lr_fraction`` at `total_steps`; ``wsd`` holds, then falls linearly over ``decay_steps``.
    Being a function of the step alone it needs no state and is the same after every resume.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    floor = config.final_lr_fraction
    shape = 1.0
    if config.schedule == "cosine":
        progress = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        shape = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    elif config.schedule == "wsd":
        shape = floor + (1 - floor) * min(1.0, max(0, total_steps - step) / config.decay_steps)
    return config.lr * warmup * shape
