"""The numerics guard that never makes the host wait: norm, clipping and the decision to skip stay on the device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ardist.training.fragments import Fragments


class DeviceGuard:
    """Clips by global norm and skips a non-finite step through fused AdamW's ``grad_scale`` and ``found_inf``.

    One all-reduced sum of squares gives norm, clip factor and flag on every rank alike, so all ranks agree. The fused
    kernel then leaves weights, moments and its step count bit-unchanged when the flag is set. For ZeRO 0, 1 and 2;
    ZeRO-3 checks by itself.
    """

    def __init__(self, fragments: Fragments, clip: float) -> None:
        self.fragments = fragments
        self.clip = clip

    @torch.no_grad()
    def arm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand clip factor and flag to AdamW before its step; returns (gradient norm, 1.0 if skipped else 0.0)."""
        gradients, partial = self.fragments.gradients()
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.fragments.world.device)
        if partial and self.fragments.world.size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        finite = torch.isfinite(norm)
        skipped = (~finite).float()
        scale = ((norm + 1e-6) / self.clip).clamp(min=1.0) if self.clip else torch.ones_like(norm)
        optimizer = self.fragments.optimizer
        optimizer.found_inf = skipped
        optimizer.grad_scale = torch.where(finite, scale, torch.ones_like(scale))
        return norm, skipped
