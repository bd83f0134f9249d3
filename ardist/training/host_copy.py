"""The state of this rank copied into host memory that is kept for it, so that a save blocks for a copy and no more."""

from __future__ import annotations

from typing import Any

import torch

from ardist.training.ema import ShardedEMA
from ardist.training.fragments import MOMENTS, Fragments, Run
from ardist.training.parts import ema_kind


class HostCopy:
    """One flat fp32 buffer per kind of state, allocated at once (pinned with a GPU) and used again by every save.

    `index`: (parameter name, start in the flattened parameter, length, place in the buffer) of every owned fragment.
    """

    def __init__(self, fragments: Fragments, ema: ShardedEMA | None) -> None:
        self.fragments = fragments
        self.ema = ema
        self._cuda = fragments.world.device.type == "cuda"
        self._copied: Any = torch.cuda.Event() if self._cuda else None
        self.index: list[tuple[str, int, int, int]] = []
        self._spans: list[tuple[int, int, int]] = []
        length = 0
        for number, run in enumerate(fragments.owned):
            for first, last in _spans(run):
                self._spans.append((number, first, last))
            for fragment in run.fragments:
                self.index.append((fragment.name, fragment.start, fragment.length, length))
                length += fragment.length
        kinds = ["master", *MOMENTS, *(ema_kind(decay) for decay in (ema.decays if ema else ()))]
        self.buffers = {kind: torch.zeros(length, dtype=torch.float32, pin_memory=self._cuda) for kind in kinds}

    @torch.no_grad()
    def take(self) -> dict[str, torch.Tensor]:
        """Copy the state of this moment; returns the buffers of the kinds there are.

        On a GPU the copies are queued on the loop's stream, before its next optimiser step; `wait` for them.
        """
        runs = self.fragments.owned
        sources: dict[str, list[torch.Tensor]] = {"master": [self.fragments.master(run) for run in runs]}
        if self.fragments.has_moments():
            sources |= {kind: [self.fragments.moment(run, kind) for run in runs] for kind in MOMENTS}
        if self.ema is not None:
            sources |= {ema_kind(decay): buffers for decay, buffers in self.ema.buffers.items()}
        sizes = [last - first for _, first, last in self._spans]
        for kind, stretches in sources.items():
            wanted = [stretches[run][first:last] for run, first, last in self._spans]
            if wanted:
                torch._foreach_copy_(list(self.buffers[kind].split(sizes)), wanted, non_blocking=self._cuda)
        if self._cuda:
            self._copied.record()
        return {kind: self.buffers[kind] for kind in sources}

    def wait(self) -> None:
        """Return when the last copy has arrived."""
        if self._cuda:
            self._copied.synchronize()


def _spans(run: Run) -> list[tuple[int, int]]:
    """Stretches [first, last) of a run that hold its fragments in their order, as few as there can be: padding lies
    between them."""
    spans: list[tuple[int, int]] = []
    for fragment in run.fragments:
        first, last = fragment.offset, fragment.offset + fragment.length
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return spans
