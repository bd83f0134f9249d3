"""The numerics guards that never make the host wait: norm, clipping and the decision to skip stay on the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ardist.training.fragments import Fragments
from ardist.training.spikes import SpikeDetectors


def on_device(flag: torch.Tensor | bool, like: torch.Tensor) -> torch.Tensor:
    """`flag` (a number above 0: true) as a 0-dim boolean tensor beside `like`, without a copy from the host."""
    if isinstance(flag, torch.Tensor):
        return flag > 0
    return torch.full_like(like, flag, dtype=torch.bool)


class DeviceGuard:
    """Clips by global norm and skips a bad step through fused AdamW's ``grad_scale`` and ``found_inf``.

    Bad is a step with a non-finite gradient, and one whose norm is a spike where `spikes` says to skip those.

    One all-reduced sum of squares gives norm, clip factor and flag on every rank alike, so all ranks agree. The fused
    kernel then leaves weights, moments and its step count bit-unchanged when the flag is set. For ZeRO 0, 1 and 2;
    ZeRO-3 checks by itself.
    """

    def __init__(self, fragments: Fragments, clip: float, spikes: SpikeDetectors | None = None) -> None:
        self.fragments = fragments
        self.clip = clip
        self.spikes = spikes

    @torch.no_grad()
    def arm(self, veto: torch.Tensor | bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | bool]:
        """Hand clip factor and flag to AdamW before its step; returns (gradient norm, 1.0 if skipped else 0.0, spike
        or not). With a `veto`, which all ranks must agree on, the step is skipped whatever the gradient."""
        gradients, partial = self.fragments.gradients()
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.fragments.world.device)
        if partial and self.fragments.world.size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        finite = torch.isfinite(norm)
        spike = self.spikes.judge(norm) if self.spikes is not None else False
        bad = ~finite | on_device(veto, finite)
        skipped = (bad | spike if self.spikes is not None and self.spikes.skip else bad).float()
        scale = ((norm + 1e-6) / self.clip).clamp(min=1.0) if self.clip else torch.ones_like(norm)
        optimizer = self.fragments.optimizer
        optimizer.found_inf = skipped
        optimizer.grad_scale = torch.where(finite, scale, torch.ones_like(scale))
        return norm, skipped, spike


class SpikeGuard:
    """Keeps AdamW from a spike where DeepSpeed itself measures, checks and clips: it skips no finite gradient.

    DeepSpeed knows the norm only within its step, so the spike is judged at the last moment before AdamW's, and
    skipped through ``found_inf`` like everything else.
    """

    def __init__(self, fragments: Fragments, spikes: SpikeDetectors) -> None:
        self.fragments = fragments
        self.spikes = spikes
        self._spike: torch.Tensor | None = None
        fragments.optimizer.register_step_pre_hook(self._before_adamw)

    def _before_adamw(self, optimizer: Any, *_: Any) -> None:
        if self._spike is None:  # ZeRO calls AdamW once per parameter group or sub-group
            self._spike = self.spikes.judge(self.fragments.grad_norm())
            optimizer.found_inf = self._spike.float()

    def verdict(self) -> torch.Tensor | bool:
        """Whether the step that was just made was a spike; False when DeepSpeed skipped it before."""
        spike, self._spike = self._spike, None
        return False if spike is None else spike
