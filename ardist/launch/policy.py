"""Whether a failed job is worth another try, and after which pause."""

from __future__ import annotations

from dataclasses import dataclass

from ardist.config.launch import LaunchConfig
from ardist.errors import ConfigError, DataError
from ardist.launch.watchdog import Failure

MAX_PAUSE_SECONDS = 60.0
_HOPELESS = (ConfigError.exit_code, DataError.exit_code)


def is_hopeless(failure: Failure) -> bool:
    """True for what the user has to change: another try would end the same way."""
    return failure.exit_code in _HOPELESS


@dataclass(frozen=True)
class Decision:
    """Start again after `pause` seconds as number `count` in a row, unless there is a `problem`."""

    pause: float = 0.0
    count: int = 0
    problem: str | None = None


class RestartPolicy:
    """Counts restarts without a new checkpoint in between: a long run may fail often as long as it gets on."""

    def __init__(self, limits: LaunchConfig) -> None:
        self._limits = limits
        self._count = 0
        self._resumed = -1
        self._last: Failure | None = None

    def decide(self, failure: Failure, *, resumed: int | None, steps: int) -> Decision:
        """After an attempt that went on from step `resumed` (None: it never got so far) and made `steps` steps."""
        if resumed is not None:
            if resumed > self._resumed >= 0:
                self._count = 0
            self._resumed = resumed
        last, self._last = self._last, failure
        if is_hopeless(failure):
            return Decision(problem="another try would end the same way")
        # Only what ranks told: machines that are not there may come back.
        told = failure.cause in ("error", "start")
        if (
            told
            and not steps
            and last is not None
            and (last.exit_code, last.detail) == (failure.exit_code, failure.detail)
        ):
            return Decision(problem="it failed twice in the same way before its first step")
        if self._count >= self._limits.max_restarts:
            return Decision(
                problem=f"launch.max_restarts={self._limits.max_restarts} without a new checkpoint are used up"
            )
        pause = min(MAX_PAUSE_SECONDS, self._limits.restart_pause_seconds * 2**self._count)
        self._count += 1
        return Decision(pause, self._count)
