"""The judgement on heartbeats: is a rank stopped, is the job stuck, and who is to blame."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ardist.config.launch import LaunchConfig
from ardist.training.heartbeat import Beat, Phase

END_SECONDS = 60.0
"""Time that processes have to be gone after the last rank said its last word."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before the run did; `seconds` passed between the rank's last sign and the discovery.

    Causes: ``cut off`` (a machine), ``stopped``, ``died``, ``stuck``, ``error`` (told by a rank), ``start`` (ranks left
    or stayed without a word), ``machines`` (nothing could be started on them).
    """

    cause: str
    detail: str
    rank: int | None = None
    host: str | None = None
    phase: str | None = None
    step: int | None = None
    seconds: float = 0.0
    exit_code: int | None = None

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


class Watchdog:
    """Looks at the beats of an attempt, which begins when this is made. Only times of this machine's monotonic clock
    are compared."""

    def __init__(self, limits: LaunchConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._began = clock()

    def look(self, beats: Sequence[Beat], ranks: int) -> Failure | None:
        """The failure there is, or None, where `ranks` should be heard. How ranks have ended is not judged here.

        A rank whose beats stopped is stopped, whatever the others do. One that never beat has the time of a start.
        When beats come but no rank gets on, the one furthest behind is what the others wait for, and its phase decides
        how long is too long.
        """
        running = [beat for beat in beats if beat.exit_code is None]
        now = self._clock()
        silent = min(running, key=lambda beat: beat.beat, default=None)
        if silent is not None and now - silent.beat > self._limits.heartbeat_seconds:
            return _failure("stopped", "gave no sign of life", [silent], now - silent.beat)
        waited = now - self._began
        if len(beats) < ranks and waited > self._limits.other_seconds:
            detail = f"{ranks - len(beats)} of {ranks} ranks were not heard of within {waited:.1f} s"
            return Failure("start", detail, seconds=waited)
        if not running:
            return None
        since = now - max(beat.progress_time for beat in running)
        least = min((beat.step, beat.progress) for beat in running)
        behind = [beat for beat in running if (beat.step, beat.progress) == least]
        if since > self.limit(behind[0]):
            return _failure("stuck", "made no progress", behind, since)
        return None

    def overdue(self, beats: Sequence[Beat], ranks: int) -> int | None:
        """The exit code that all `ranks` told, when their processes should have been gone for long; None before."""
        codes = [beat.exit_code for beat in beats if beat.exit_code is not None]
        if not codes or len(codes) < max(ranks, len(beats)):
            return None
        since = self._clock() - max(beat.ended for beat in beats)
        return max(codes) if since > END_SECONDS else None

    def limit(self, beat: Beat) -> float:
        """How long nothing may happen when `beat` is the rank furthest behind."""
        if beat.phase is Phase.DATA:
            return self._limits.data_seconds
        # The first step of a process compiles kernels and fills caches.
        if beat.phase is Phase.STEP and beat.first_step is not None and beat.step > beat.first_step:
            return self._limits.step_seconds
        return self._limits.other_seconds


def _failure(cause: str, what: str, beats: Sequence[Beat], seconds: float) -> Failure:
    """Of ranks at the same point none is named as the culprit: only their stacks can tell."""
    first = beats[0]
    who = f"rank {first.rank} on {first.host}"
    if len(beats) > 1:
        who = f"ranks {', '.join(str(beat.rank) for beat in beats)}"
    detail = f"{who} {what} for {seconds:.1f} s {first.phase.words}, after step {first.step}"
    rank, host = (first.rank, first.host) if len(beats) == 1 else (None, None)
    return Failure(cause, detail, rank, host, first.phase.words, first.step, seconds)
