"""AdamW, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ardist.config.training import OptimizerConfig

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
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu_adam: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return cpu_adam
    return torch.optim.AdamW(groups, fused=True, **settings)


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
