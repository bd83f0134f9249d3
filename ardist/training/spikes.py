"""Gradient spikes: steps whose gradient norm stands out from those of the steps before, told without a host read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

SMALLEST_DEVIATION = 0.05
"""Norms that hardly vary have hardly a deviation; it counts as at least this fraction of their mean."""


class SpikeDetector:
    """Compares each gradient norm with the mean and deviation of the last `window` good ones.

    A norm is a spike when it is above mean + `sigmas` x deviation; nothing is judged before the window is full. With
    `skip` the step of a spike is to be skipped, so its norm does not enter the window either. All numbers stay on
    `device`, so that judging a step makes nobody wait; every rank sees the same norm and says the same.
    """

    def __init__(self, sigmas: float, window: int, *, skip: bool, device: torch.device) -> None:
        self.sigmas = sigmas
        self.window = window
        self.skip = skip
        self._norms = torch.zeros(window, dtype=torch.float64, device=device)
        self._known = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def judge(self, norm: torch.Tensor | float) -> torch.Tensor:
        """Whether this step's norm is a spike, as a 0-dim bool tensor; the norm then belongs to the past."""
        if not isinstance(norm, torch.Tensor):
            norm = torch.full((), norm, dtype=torch.float64, device=self._norms.device)
        norm = norm.detach().to(self._norms)
        mean, deviation = self._norms.mean(), self._norms.std()
        limit = mean + self.sigmas * torch.maximum(deviation, SMALLEST_DEVIATION * mean)
        spike = (self._known >= self.window) & (norm > limit) & torch.isfinite(norm)
        kept = torch.isfinite(norm) & ~spike if self.skip else torch.isfinite(norm)
        self._norms = torch.where(kept, torch.cat([self._norms[1:], norm.view(1)]), self._norms)
        self._known += kept
        return spike

    def state(self) -> list[float]:
        """The norms in the window, oldest first, for a checkpoint (reads the device)."""
        known = min(int(self._known), self.window)
        return self._norms[self.window - known :].tolist()

    def load_state(self, norms: Sequence[float]) -> None:
        """Continue with the norms of a checkpoint; of a longer window the newest."""
        kept = list(norms)[-self.window :]
        self._norms.zero_()
        if kept:
            self._norms[self.window - len(kept) :] = torch.tensor(kept, dtype=torch.float64)
        self._known.fill_(len(kept))


class SpikeDetectors:
    """A detector for each number of frames: images and clips have gradients of unlike size, and none is to look like a
    spike because it is rare."""

    def __init__(self, make: Callable[[], SpikeDetector]) -> None:
        self._make = make
        self._of: dict[int, SpikeDetector] = {}
        self._inherited: list[float] = []
        self._now = make()
        self.skip = self._now.skip

    def begin(self, num_frames: int) -> None:
        """The next norm is of a step on clips of so many frames, and is compared with those of such steps."""
        if num_frames not in self._of:
            self._of[num_frames] = self._make()
            self._of[num_frames].load_state(self._inherited)
        self._now = self._of[num_frames]

    def judge(self, norm: torch.Tensor | float) -> torch.Tensor:
        """Whether this step's norm is a spike among those of its kind; see `SpikeDetector.judge`."""
        return self._now.judge(norm)

    def state(self) -> dict[str, list[float]]:
        """The norms in each window, by number of frames, for a checkpoint (reads the device)."""
        return {str(frames): detector.state() for frames, detector in sorted(self._of.items())}

    def load_state(self, norms: Mapping[str, Sequence[float]] | Sequence[float]) -> None:
        """Continue from a checkpoint; those of before had one window, from which every kind then starts."""
        self._of.clear()
        self._inherited = [] if isinstance(norms, Mapping) else list(norms)
        for frames, kept in norms.items() if isinstance(norms, Mapping) else ():
            self.begin(int(frames))
            self._now.load_state(kept)
