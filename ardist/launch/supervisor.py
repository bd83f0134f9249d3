"""The restart loop: run an attempt, see why it ended, clean up, decide, keep the books."""

from __future__ import annotations

import itertools
import logging
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ardist.config.launch import LaunchConfig
from ardist.errors import ArdistError, HardwareError, Preempted
from ardist.events import events
from ardist.launch.nodes import Node, State
from ardist.launch.policy import RestartPolicy, is_hopeless
from ardist.launch.together import together
from ardist.launch.watchdog import Failure, Watchdog
from ardist.training import goodput

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
POLL_SECONDS = 0.1
DEBOUNCE_SECONDS = 2.0
LEAVING_SECONDS = 10.0
"""Time that ranks have to leave by themselves when one was stopped before the first step."""

_BLAME = ("cut off", "stopped", "died", "stuck", "error", "start")
_log = logging.getLogger("ardist.launch")


@dataclass
class Attempt:
    """One start of all ranks, in seconds since the supervisor's start."""

    number: int
    began: float
    first_step: int | None = None
    steps: int = 0


class Supervisor:
    """Runs attempts until the run is done, stopped on request, or not worth another try."""

    def __init__(
        self,
        limits: LaunchConfig,
        run_dir: Path,
        start: Callable[[int, str], Sequence[Node]],
        *,
        keeps_book: bool = True,
    ) -> None:
        """`start` starts all ranks for an attempt's number and the job's name and returns the machines.

        Of several supervisors of one run, one on every machine, only the first keeps the book.
        """
        self._limits = limits
        self._run_dir = run_dir
        self._start = start
        self._keeps_book = keeps_book
        self._job = secrets.token_hex(4)
        self._began = time.monotonic()
        self._signals: list[tuple[int, float]] = []
        self._forwarded = 0

    def run(self) -> int:
        """Until the end; returns the exit code of the whole job."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._keeps_book and self._run_dir.is_dir():
                self._note(goodput.refresh_summary, self._run_dir)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signals.append((number, time.monotonic()))

    def _run(self) -> int:
        policy = RestartPolicy(self._limits)
        for number in itertools.count(1):
            attempt = Attempt(number, self._now())
            outcome = self._attempt(attempt)
            if isinstance(outcome, int):
                return outcome
            decision = policy.decide(outcome, resumed=attempt.first_step, steps=attempt.steps)
            problem = decision.problem
            if self._signals:
                problem = "it was asked to stop, but not everything could be saved"
            if problem is not None:
                _log.error("attempt %d ended, %s; not started again: %s", number, outcome, problem)
                return _exit_code(outcome)
            _log.warning(
                "attempt %d ended, %s (noticed after %.1f s); restart %d of at most %d without new checkpoint, in %g s",
                *(number, outcome, outcome.seconds, decision.count, self._limits.max_restarts, decision.pause),
            )
            if (stopped := self._pause(decision.pause)) is not None:
                return stopped
        raise AssertionError("attempts are not bounded by their number")

    def _pause(self, seconds: float) -> int | None:
        """Wait; a signal meanwhile ends the job, whose last checkpoint is all there is to save."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._signals:
                return Preempted.exit_code
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
        return Preempted.exit_code if self._signals else None

    def _attempt(self, attempt: Attempt) -> int | Failure:
        try:
            nodes = self._start_nodes(attempt)
        except ArdistError as error:
            if attempt.number == 1:
                raise  # nothing ran yet: this is for the user to mend
            return Failure("machines", str(error), exit_code=error.exit_code)
        failed = None
        try:
            outcome = self._watch(attempt, nodes)
            if isinstance(outcome, Failure):
                failed = self._now() - outcome.seconds
                self._keep_stacks(attempt, nodes)
        finally:
            together(lambda node: node.kill(), nodes)
        cause = {0: "done", Preempted.exit_code: "preempted"}
        details: dict[str, Any] = {"exit_code": outcome}
        if isinstance(outcome, Failure):
            details = {
                "failed": failed, "detail": outcome.detail, "rank": outcome.rank, "phase": outcome.phase,
                "step": outcome.step, "detect_seconds": outcome.seconds, "exit_code": _exit_code(outcome),
            }  # fmt: skip
        # What never trained is not written into what may be another job's run directory.
        if self._keeps_book and self._run_dir.is_dir() and (attempt.first_step is not None or attempt.number > 1):
            name = outcome.cause if isinstance(outcome, Failure) else cause.get(outcome, "stopped at once")
            details |= {"began": attempt.began, "ended": self._now(), "cause": name}
            self._note(goodput.note_end, self._run_dir, self._job, attempt.number, **details)
        return outcome

    def _start_nodes(self, attempt: Attempt) -> Sequence[Node]:
        """No room for a process, a file or a connection is a fault of the environment, and may pass."""
        try:
            return self._start(attempt.number, self._job)
        except OSError as error:
            raise HardwareError(f"the ranks cannot be started: {error}") from error

    def _watch(self, attempt: Attempt, nodes: Sequence[Node]) -> int | Failure:
        watchdog = Watchdog(self._limits)
        left_at: float | None = None
        while True:
            if (code := self._forward(nodes)) is not None:
                return code
            heard = self._heard([(node, node.state()) for node in nodes])
            states, watched = [state for _, state in heard], sum(node.watched for node, _ in heard)
            beats = [beat for state in states for beat in state.beats]
            self._note_steps(attempt, beats, max(len(beats), sum(node.ranks for node in nodes)))
            failures = [state.failure for state in states if state.failure is not None]
            first = min(failures, key=lambda one: _BLAME.index(one.cause), default=None)
            failure = first or watchdog.look(beats, watched)
            if failure is not None:
                starting = failure.cause in ("died", "start", "error") and attempt.first_step is None
                if self._signals and starting and not is_hopeless(failure):
                    return Preempted.exit_code  # asked to stop while it started: there is nothing new to save
                return failure
            if not attempt.steps and any(beat.exit_code == Preempted.exit_code for beat in beats):
                # Who was asked to stop before the ranks had met leaves; the others wait for it and cannot hear.
                left_at = left_at or time.monotonic()
                if time.monotonic() - left_at > LEAVING_SECONDS:
                    _log.warning("stopped on request while the ranks were starting; those that still wait are ended")
                    return Preempted.exit_code
            codes = [state.exit_code for state in states]
            if None not in codes:
                return max(code for code in codes if code is not None)
            if (told := watchdog.overdue(beats, watched)) is not None:
                events.count("launch.hung_at_end", code=told)
                self._keep_stacks(attempt, nodes)
                return told
            time.sleep(POLL_SECONDS)

    def _heard(self, told: list[tuple[Node, State]]) -> list[tuple[Node, State]]:
        """All; after a signal without machines that were cut off, as long as ranks of others may still save.

        Who ends a whole job may end the connections too; that is no reason to kill the rest in the middle of a save.
        """
        if not self._signals or time.monotonic() - self._signals[0][1] > self._limits.grace_seconds:
            return told
        heard = [(node, state) for node, state in told if state.failure is None or state.failure.cause != "cut off"]
        return heard if any(state.beats for _, state in heard) else told

    def _forward(self, nodes: Sequence[Node]) -> int | None:
        """Pass new signals on; the second one, after two seconds, ends everything at once."""
        while self._forwarded < len(self._signals):
            number, when = self._signals[self._forwarded]
            self._forwarded += 1
            if when - self._signals[0][1] >= DEBOUNCE_SECONDS:
                _log.warning("a second signal, %s: stopping at once", signal.Signals(number).name)
                return 128 + number
            for node in nodes:
                node.send_signal(number)
            _log.info("%s was passed on", signal.Signals(number).name)
        return None

    def _note_steps(self, attempt: Attempt, beats: Sequence[Any], ranks: int) -> None:
        first = min((beat.first_step for beat in beats if beat.first_step is not None), default=None)
        attempt.first_step = first if first is not None else attempt.first_step
        steps = max((beat.step for beat in beats), default=0)
        writes = self._keeps_book and self._run_dir.is_dir()
        if writes and first is not None and steps > first and not attempt.steps:
            details = {"at": self._now(), "resumed_step": first, "ranks": ranks}
            self._note(goodput.note_first_step, self._run_dir, self._job, attempt.number, **details)
        attempt.steps = max(0, steps - first) if first is not None else 0

    def _note(self, write: Callable[..., None], *words: Any, **details: Any) -> None:
        """Write into the book; a full disk costs the book a line, never the job."""
        try:
            write(*words, **details)
        except OSError as error:
            events.count("launch.book_failed", what=write.__name__, reason=error)

    def _keep_stacks(self, attempt: Attempt, nodes: Sequence[Node]) -> None:
        logs = self._run_dir / "logs"
        for texts in together(_stacks, nodes):
            for name, text in texts.items():
                try:
                    logs.mkdir(parents=True, exist_ok=True)
                    path = logs / f"attempt-{attempt.number:03d}-{name}"
                    path.write_text(text, encoding="utf-8")
                except OSError as error:
                    _log.error("the stacks of %s cannot be written: %s", name, error)
                    return

    def _now(self) -> float:
        return time.monotonic() - self._began


def _stacks(node: Node) -> dict[str, str]:
    try:
        return node.stacks()
    except OSError as error:
        events.count("launch.no_stacks", host=node.name, reason=error)
        return {}


def _exit_code(failure: Failure) -> int:
    """That of the rank that failed; a death, a hang and a lost machine are the environment's fault."""
    return HardwareError.exit_code if failure.exit_code is None else failure.exit_code
