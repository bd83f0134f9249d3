"""Pure arithmetic of frame times: from packet times to a frame rate, a grid and the clips on it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from data_tools.reasons import Reason, Refusal

MIN_RATE, MAX_RATE = Fraction(1, 10), Fraction(240)
_USUAL = [Fraction(n) for n in (5, 6, 8, 10, 12, 15, 16, 18, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 144, 240)]
_USUAL += [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)]


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown.

    `rate` is the video's own frame rate, `start` the time of its first frame in seconds of the container's clock,
    `last` that of its last frame, `max_gap` the longest time that a frame is shown, and `by_index` says that the
    times are unusable and frames are counted instead.
    """

    rate: Fraction
    start: Fraction
    last: Fraction
    count: int
    max_gap: Fraction
    by_index: bool = False

    def grid_length(self, fps: Fraction | None) -> int:
        """Frames when shown at `fps` (None: its own rate): the last lies nearest to the video's last frame."""
        rate = self.rate if fps is None else fps
        return round((self.last - self.start) * rate) + 1


def measure(times: Sequence[int | None], time_base: Fraction, claimed: Sequence[Fraction | None]) -> Timeline:
    """The timeline of packets with these presentation times (any order, None: unknown).

    The rate is that of the frames which follow one another evenly, where most do: a pause or lost packets do not move
    the others off their grid. `claimed` are frame rates that the container states, best first; they are believed only
    where they agree with the times within 2%. Raises `Refusal` when there is nothing to go by.
    """
    count = len(times)
    if count == 0:
        raise Refusal(Reason.NO_VIDEO, "the video stream holds no packets")
    plausible = [rate for rate in claimed if rate is not None and MIN_RATE <= rate <= MAX_RATE]
    known = sorted({time for time in times if time is not None})
    if len(known) < count * 0.9 or (len(known) < 2 and count > 1):
        return _by_index(count, plausible)
    start, last = known[0] * time_base, known[-1] * time_base
    if count == 1:
        rate = plausible[0] if plausible else Fraction(1)
        return Timeline(rate, start, start, 1, 1 / rate)
    mean = (len(known) - 1) / (last - start)
    if mean > MAX_RATE * 2 or mean < Fraction(1, 3600):
        raise Refusal(Reason.TIMESTAMPS, f"{count} frames over {float(last - start):.6g} s is no frame rate")
    gaps = [after - before for before, after in itertools.pairwise(known)]
    measured = _even_rate(gaps, time_base) or mean
    believed = [rate for rate in plausible if abs(rate / measured - 1) < Fraction(2, 100)]
    rate = believed[0] if believed else _nearest_usual(measured)
    return Timeline(rate, start, last, count, max(gaps) * time_base)


def _even_rate(gaps: Sequence[int], time_base: Fraction) -> Fraction | None:
    """Frames per second of the frames that follow one another evenly, or None where fewer than three in four do."""
    typical = sorted(gaps)[len(gaps) // 2]
    even = [gap for gap in gaps if abs(gap - typical) <= max(1, typical // 50)]
    return len(even) / (sum(even) * time_base) if len(even) * 4 >= len(gaps) * 3 else None


def _by_index(count: int, plausible: Sequence[Fraction]) -> Timeline:
    if not plausible:
        raise Refusal(Reason.TIMESTAMPS, f"{count} frames without times and without a usable frame rate")
    rate = plausible[0]
    return Timeline(rate, Fraction(0), (count - 1) / rate, count, 1 / rate, by_index=True)


def _nearest_usual(mean: Fraction) -> Fraction:
    near = min(_USUAL, key=lambda rate: abs(rate / mean - 1))
    if abs(near / mean - 1) < Fraction(1, 100):
        return near
    return max(MIN_RATE, min(MAX_RATE, mean.limit_denominator(1001)))


def clip_starts(length: int, num_frames: int, stride: int, portion: tuple[float, float], most: int | None) -> list[int]:
    """First grid frames of the clips of a video with `length` grid frames, ascending.

    Clips lie wholly inside the portion [a, b) of the grid; of more than `most`, evenly spaced ones are taken.
    """
    low, high = (round(length * edge) for edge in portion)
    starts = list(range(low, high - num_frames + 1, stride))
    if most is not None and len(starts) > most:
        starts = [starts[i * len(starts) // most + len(starts) // (2 * most)] for i in range(most)]
    return starts


def seek_time(keyframes: Sequence[Fraction], time: Fraction) -> Fraction | None:
    """The last key frame at or before `time`; None where decoding must begin at the beginning."""
    at = bisect.bisect_right(keyframes, time)
    return keyframes[at - 1] if at > 1 else None
