"""The AD (adaptive difference) schedule of asynchronous sampling: which frame is denoised in which row.

Source: AR-Diffusion (arXiv 2503.07418), "AD timestep scheduler". The paper walks a matrix of timesteps row by row; the
walk has a closed form, which is all this file computes. With S evaluations per frame, a difference of s evaluations
between neighbours, and j counting the generated frames from 0:

    after row n = 1..N, N = S + (J-1) s, frame j has had k_j(n) = clip(n - s j, 0, S) evaluations.

s = 0 denoises all frames together, s = S one frame after another (the paper's "s = T").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ardist.errors import InvalidValueError, check_integer, choose

WindowKind = Literal["rolling", "recompute"]
WINDOW_KINDS = ("rolling", "recompute")


@dataclass(frozen=True)
class ADSchedule:
    """Rows of network calls that turn noise into `num_frames` frames with `num_steps` evaluations each.

    num_frames F: all frames, prefix included.  num_steps S: divides num_timesteps T, S < T.  difference s: 0..S.
    window W: frames the network sees at once; None is all of them.  window_kind, where F > W:
      rolling    every frame sees itself and the W-1 frames before it; keys and values of finished frames are cached
                 (also where F <= W), so a row evaluates its active frames and the frame that has just finished. Any s.
      recompute  the authors' window [e-W, e), common to all frames of a row, evaluated whole in every row; needs
                 s W >= S, or frames would leave the window unfinished.
    num_prefix_frames P: frames 0..P-1 are given and count as finished (continuation, image-to-video); 0 <= P < F.

    Rows are numbered 1..num_rows; "after row 0" is the start. Methods that return tensors take a device and never read
    one back. Raises InvalidValueError, with the legal values, for anything that does not fit together.
    """

    num_frames: int
    num_steps: int
    difference: int
    window: int | None = None
    window_kind: str = "rolling"
    num_timesteps: int = 1000
    num_prefix_frames: int = 0

    def __post_init__(self) -> None:
        frames, steps, total = self.num_frames, self.num_steps, self.num_timesteps
        choose("window_kind", self.window_kind, WINDOW_KINDS)
        for name in ("num_frames", "num_steps", "difference", "window", "num_timesteps", "num_prefix_frames"):
            if name != "window" or self.window is not None:
                check_integer(name, getattr(self, name))
        if frames < 1:
            raise InvalidValueError(f"num_frames={frames} is out of range; legal: 1 and more")
        if not 0 <= self.num_prefix_frames < frames:
            raise InvalidValueError(
                f"num_prefix_frames={self.num_prefix_frames} leaves no frame to generate; legal: 0..{frames - 1}"
            )
        if total < 2:
            raise InvalidValueError(f"num_timesteps={total} is out of range; legal: 2 and more")
        if not 1 <= steps < total or total % steps:
            legal = ", ".join(str(s) for s in range(1, total // 2 + 1) if total % s == 0)
            raise InvalidValueError(
                f"num_steps={steps} must divide num_timesteps={total} and be smaller; legal: {legal}"
            )
        if self.window is not None and self.window < 1:
            raise InvalidValueError(f"window={self.window} is out of range; legal: 1 and more, or None")
        if not 0 <= self.difference <= steps:
            raise InvalidValueError(
                f"difference={self.difference} is out of range; legal: {self._smallest_difference}..{steps}"
            )
        if self.difference < self._smallest_difference:
            raise InvalidValueError(
                f"difference={self.difference} is too small for a recompute window of {self.window} frames: frames "
                f"would leave it after {self.difference * self._window} of {steps} evaluations; "
                f"legal: {self._smallest_difference}..{steps}, or, with the strict mask, a rolling window"
            )

    # Sizes

    @property
    def num_rows(self) -> int:
        """N, the network calls that denoise (each of twice the batch where classifier-free guidance is on)."""
        return self.num_steps + (self.num_generated_frames - 1) * self.difference

    @property
    def num_network_calls(self) -> int:
        """All network calls of one run: the rows, and those that only show the prefix to the network."""
        return self.num_rows + len(self.prefix_ranges)

    @property
    def num_generated_frames(self) -> int:
        """Frames that are denoised, F - P."""
        return self.num_frames - self.num_prefix_frames

    @property
    def max_active_frames(self) -> int:
        """Most frames that are denoised in one row."""
        if self.difference == 0:
            return self.num_generated_frames
        return min(self.num_generated_frames, -(-self.num_steps // self.difference))

    @property
    def num_frame_evaluations(self) -> int:
        """Frames that pass through the network in all rows together: the work of one run."""
        if self.window_kind == "recompute":
            return self._window * self.num_rows
        rows = range(1, self.num_rows + 1)
        return sum(end - start for start, end in (*self.prefix_ranges, *map(self.evaluated_range, rows)))

    @property
    def first_frame_row(self) -> int:
        """The row after which the first generated frame is ready."""
        return self.num_steps

    def finish_row(self, frame: int) -> int:
        """The row after which `frame` is final; 0 for a prefix frame."""
        generated = frame - self.num_prefix_frames
        return 0 if generated < 0 else self.num_steps + self.difference * generated

    # Ranges of frames in one row, as Python numbers: they shape the network's input.

    @property
    def prefix_ranges(self) -> list[tuple[int, int]]:
        """[start, end) of the given frames that enter the cache in a call of their own before row 1.

        A prefix longer than the window enters in pieces of W frames, the last of them in row 1; a shorter one enters
        in row 1 whole.
        """
        if self.window_kind == "recompute":
            return []
        return [
            (start, start + self._window) for start in range(0, self.num_prefix_frames - self._window, self._window)
        ]

    def active_range(self, row: int) -> tuple[int, int]:
        """[start, end) of the frames that are denoised in `row`, 1..num_rows."""
        self._check_row(row, first=1)
        if self.difference == 0:
            return self.num_prefix_frames, self.num_frames
        start = max(0, -((self.num_steps - row) // self.difference))
        end = min(self.num_generated_frames, (row - 1) // self.difference + 1)
        return self.num_prefix_frames + start, self.num_prefix_frames + end

    def evaluated_range(self, row: int) -> tuple[int, int]:
        """[start, end) of the frames that pass through the network in `row`.

        Rolling: the active frames, and before them those that became final in the row before (in row 1, the prefix or
        what `prefix_ranges` leaves of it), whose keys and values are now computed from their final latents for the
        cache. Recompute: the window.
        """
        if self.window_kind == "recompute":
            return self.window_range(row)
        if row == 1:
            return len(self.prefix_ranges) * self._window, self.active_range(row)[1]
        return self.active_range(row - 1)[0], self.active_range(row)[1]

    def window_range(self, row: int) -> tuple[int, int]:
        """[start, end) of the frames that the network sees in `row`: evaluated, or present in the cache."""
        end = self.active_range(row)[1]
        if self.window_kind == "rolling":
            return max(0, self.evaluated_range(row)[0] - self._window + 1), end
        end = min(self.num_frames, max(self._window, end))
        return end - self._window, end

    # Per-frame state

    def steps_done(self, row: int, *, device: torch.device | str | None = None) -> Int64[Tensor, " f"]:
        """Evaluations that every frame has had after `row`, 0..num_rows; 0 is not started, S is final."""
        self._check_row(row, first=0)
        frame = torch.arange(self.num_frames, device=device)
        done = (row - self.difference * (frame - self.num_prefix_frames)).clamp(0, self.num_steps)
        return torch.where(frame < self.num_prefix_frames, self.num_steps, done)

    def updated(self, row: int, *, device: torch.device | str | None = None) -> Bool[Tensor, " f"]:
        """True for the frames that are denoised in `row`."""
        start, end = self.active_range(row)
        frame = torch.arange(self.num_frames, device=device)
        return (frame >= start) & (frame < end)

    def timesteps(self, row: int, *, device: torch.device | str | None = None) -> Int64[Tensor, " f"]:
        """The timestep of every frame in the network's input of `row`: non-decreasing over the frames.

        T-1 for a frame that has not started, 1 + (T/S)(S-k) for the k-th evaluation of a frame, 1 for a final frame.
        """
        return self._evaluation_timestep(self.steps_done(row, device=device))

    def next_timesteps(self, row: int, *, device: torch.device | str | None = None) -> Int64[Tensor, " f"]:
        """The noise level that every updated frame has after `row`: that of its next evaluation, or 0 after its last.

        Of the frames that are not updated, final ones have 0, those not started T-1.
        """
        done = self.steps_done(row, device=device)
        started = torch.where(done < self.num_steps, self._evaluation_timestep(done + 1), 0)
        return torch.where(done > 0, started, self.num_timesteps - 1)

    @property
    def finished_timestep(self) -> int:
        """The timestep at which final frames are shown to the network."""
        return 1

    def _evaluation_timestep(self, evaluation: Tensor) -> Tensor:
        level = 1 + self.num_timesteps // self.num_steps * (self.num_steps - evaluation)
        return torch.where(evaluation > 0, level, self.num_timesteps - 1)

    @property
    def _window(self) -> int:
        return self.num_frames if self.window is None else min(self.window, self.num_frames)

    @property
    def _smallest_difference(self) -> int:
        # Given frames may leave the window: they are final. Generated ones leave it only if they do not all fit.
        slides = self.window_kind == "recompute" and self._window < self.num_generated_frames
        return math.ceil(self.num_steps / self._window) if slides else 0

    def _check_row(self, row: int, first: int) -> None:
        check_integer("row", row)
        if not first <= row <= self.num_rows:
            raise InvalidValueError(f"row={row} is out of range; legal: {first}..{self.num_rows}")
