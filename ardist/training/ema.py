"""Averages of the weights, kept in fragments: each rank holds the part it owns and nothing is gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ardist.training.fragments import Fragments

WARMUP_OFFSET = 10


def warmed_decay(decay: float, updates: int) -> float:
    """Decay of update number `updates` (0-based): min(decay, (1 + n) / (10 + n)) (METHOD section 3)."""
    return min(decay, (1 + updates) / (WARMUP_OFFSET + updates))


class ShardedEMA:
    """One or several EMAs of the fp32 master weights; memory per rank is (number of decays) x params / world x 4 B.

    The result is bit-equal to an EMA of the gathered weights, because every element is treated alone.
    """

    def __init__(self, fragments: Fragments, decays: Sequence[float]) -> None:
        self.fragments = fragments
        self.decays = tuple(decays)
        self.masters = [fragments.master(run) for run in fragments.owned]
        self.buffers = {decay: [master.clone() for master in self.masters] for decay in self.decays}
        device = self.masters[0].device if self.masters else torch.device("cpu")
        self._updates = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def updates(self) -> int:
        """Number of updates so far (reads the device)."""
        return int(self._updates)

    @torch.no_grad()
    def update(self, skipped: bool | torch.Tensor = False) -> None:
        """Move every average towards the masters; a skipped step leaves averages and the count bit-unchanged.

        `skipped` may be a 0-dim tensor on the device (1: skipped), so that no host read is needed.
        """
        if skipped is True:
            return
        applied = 1.0 - (skipped.double() if isinstance(skipped, torch.Tensor) else 0.0)
        warmup = (1 + self._updates) / (WARMUP_OFFSET + self._updates)
        for decay in self.decays:
            # A device scalar as weight: the warm-up needs no host read and the kernel treats it as it would a number.
            weight = ((1.0 - warmup.clamp(max=decay)) * applied).float()
            for average, master in zip(self.buffers[decay], self.masters, strict=True):
                average.lerp_(master, weight)
        self._updates += applied

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the present master weights, as a fresh run does."""
        for buffers in self.buffers.values():
            torch._foreach_copy_(buffers, self.masters)
        self._updates.zero_()

    def set_updates(self, updates: int) -> None:
        """Restore the number of updates."""
        self._updates.fill_(updates)
