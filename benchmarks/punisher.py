"""Training under fire: a random fault about every half minute, nobody to help, and the result of a quiet run.

    python benchmarks/punisher.py [--minutes 10] [--every 30] [--seed 0]

Three gloo ranks train a tiny denoiser under the supervisor of launchers/train.sh. Processes are killed, stopped,
crashed and asked to leave, the launcher itself is killed; checkpoints are damaged, cut short and refused by a full
disk; losses and weights become NaN, and a bit flips in one rank's replica. What a queue would do is done here too: a
job that left with 75, or whose launcher died, is started again. At the end the weights, the losses and the sample ids
must be those of a run that nothing happened to; what every kind of fault cost is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "launch"), str(HERE.parent / "tests" / "distributed")]

import punisher_inside as inside  # noqa: E402
import torch  # noqa: E402
from fork_ranks import TrainingJob  # noqa: E402
from tiny import losses, sample_ids, weights, write_latents  # noqa: E402

from ardist.errors import Preempted  # noqa: E402
from ardist.training import goodput  # noqa: E402
from ardist.training.heartbeat import Beat, read_beats  # noqa: E402

RANKS = 3
CHECKPOINT_EVERY = 10
STEP_SECONDS = 0.5
LAST_STEPS = 15
"""No fault strikes so near the end, where the run might be over before it shows."""
PATIENCE_SECONDS = 120.0
LAUNCHER_KILLED = -signal.SIGKILL

FLIPPED_BIT, CUT_SHORT = "B1 bit flip in the newest checkpoint", "B1 newest checkpoint cut short"
FULL_DISK, REPLICA = "B2 disk full in a checkpoint", "E5 bit flip in one rank's replica"
FAMILIES = "ABAE"
"""Which part of the catalogue of faults the next one comes from, in turn."""


@dataclass
class Strike:
    """One fault, and what it cost; None for what does not apply."""

    kind: str
    time: float
    step: int
    rank: int
    noticed_seconds: float | None = None
    back_seconds: float | None = None
    steps_again: int | None = None
    shown_as: str = ""
    detail: str = ""


@dataclass
class Outcome:
    """What the run went through, and whether it shows."""

    strikes: list[Strike] = field(default_factory=list)
    starts: int = 0
    equal: dict[str, bool] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    fallbacks: int = 0
    rollbacks: int = 0
    failed_saves: int = 0

    @property
    def kinds(self) -> Counter[str]:
        """How often each kind struck."""
        return Counter(strike.kind for strike in self.strikes)


class Punisher:
    """One run, one source of chance."""

    def __init__(self, directory: Path, *, seconds: float, every: float, seed: int, least: int = 0) -> None:
        """Faults strike for so many seconds, and on until there were `least` on a machine that is slow."""
        self.directory = directory
        self.scratch = directory / "scratch"
        self.scratch.mkdir(parents=True)
        self.every = every
        self.end = seconds
        self.least = least
        self.chance = random.Random(seed)
        self.data = write_latents(directory / "latents")
        self.steps = max(60, int(1.6 * seconds))
        self.changes: dict[str, Any] = {
            "training__steps": self.steps,
            "training__global_batch_size": 12,
            "training__zero_stage": 0,  # whole replicas, which can differ
            "checkpoint__every": CHECKPOINT_EVERY,
            "debug__replica_check_every": CHECKPOINT_EVERY // 2,
            "training__max_skipped_in_row": 2,
            "launch": {"restart_pause_seconds": 0.1, "heartbeat_seconds": 12, "step_seconds": 40, "data_seconds": 40},
        }
        self.outcome = Outcome()
        self.run_dir = directory / "job" / "run"
        self.launcher = 0
        self.kinds: dict[str, Callable[[Beat], None]] = {
            "A1 kill -9 a rank": lambda beat: os.kill(beat.pid, signal.SIGKILL),
            "A3 kill -9 half way through a part": lambda beat: self._inside(beat, inside.KILL_SAVE),
            "A4 crash a rank": lambda beat: os.kill(beat.pid, signal.SIGSEGV),
            "A5 stop a rank": lambda beat: os.kill(beat.pid, signal.SIGSTOP),
            "A10 TERM to a rank": lambda beat: os.kill(beat.pid, signal.SIGTERM),
            "A10 USR1 to the launcher": lambda beat: os.kill(self.launcher, signal.SIGUSR1),
            "A13 kill -9 the launcher": lambda beat: os.kill(self.launcher, signal.SIGKILL),
            FLIPPED_BIT: lambda beat: self._damage(beat, self._flip),
            CUT_SHORT: lambda beat: self._damage(beat, lambda content: content[: len(content) // 2]),
            FULL_DISK: lambda beat: self._inside(beat, inside.FULL_DISK),
            "E1 NaN losses of one rank": lambda beat: self._inside(beat, inside.NAN_LOSSES),
            "E4 NaN in a weight of one rank": lambda beat: self._inside(beat, inside.NAN_WEIGHT),
            REPLICA: lambda beat: self._inside(beat, inside.FLIP),
        }
        self._order = self._shuffled()
        self._signs = 0

    def run(self) -> Outcome:
        """The quiet run, the punished run, the comparison."""
        quiet = TrainingJob(self.directory / "quiet", self.data, ranks=RANKS, **self.changes)
        if quiet.run() != 0:
            raise RuntimeError(quiet.stderr())
        try:
            self._punish()
        finally:
            if self.launcher:  # only when it went wrong
                os.kill(self.launcher, signal.SIGTERM)
                os.waitpid(self.launcher, 0)
        self._compare(quiet.run_dir)
        self._reckon()
        return self.outcome

    def _punish(self) -> None:
        began = time.monotonic()
        self._start()
        strike = began + self.every / 2
        while True:
            pid, status = os.waitpid(self.launcher, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.launcher = 0
                if code == 0:
                    return
                if code not in (Preempted.exit_code, LAUNCHER_KILLED):
                    raise RuntimeError(f"the launcher ended with exit code {code}")
                self._start()
            goes_on = time.monotonic() < began + self.end or len(self.outcome.strikes) < self.least
            if goes_on and strike < time.monotonic() and self._strike():
                strike = time.monotonic() + self.every * self.chance.uniform(0.7, 1.3)
            time.sleep(0.05)

    def _start(self) -> None:
        """A launcher of its own process, as the queue would start it."""
        self.outcome.starts += 1
        seed = self.chance.randrange(2**32)
        self.launcher = os.fork()
        if self.launcher == 0:
            tempfile.tempdir = str(self.scratch)
            job = TrainingJob(
                self.directory / "job",
                self.data,
                ranks=RANKS,
                faults=lambda attempt: f"sleep@trainer.batch:{STEP_SECONDS}",
                callbacks=lambda: [inside.Saboteur(self.run_dir.parent, CHECKPOINT_EVERY, seed + os.getpid())],
                **self.changes,
            )
            code = 1
            try:
                code = job.run()
            finally:
                os._exit(code)

    def _shuffled(self) -> Iterator[str]:
        """Every kind of a family once in a random order, then all again; the families in turn."""
        decks: dict[str, list[str]] = {family: [] for family in FAMILIES}
        while True:
            for family in FAMILIES:
                if not decks[family]:
                    decks[family] = [kind for kind in self.kinds if kind[0] == family]
                    self.chance.shuffle(decks[family])
                yield decks[family].pop()

    def _strike(self) -> bool:
        """One fault; False while the last one does not show yet, or a checkpoint is near, or there is only one."""
        beats = self._beats()
        if len(beats) < RANKS or any(beat.first_step is None or beat.step <= beat.first_step for beat in beats):
            return False
        step, checkpoints = max(beat.step for beat in beats), self._checkpoints()
        if self._signs_of_life() <= self._signs:
            since = time.time() - self.outcome.strikes[-1].time
            if since > PATIENCE_SECONDS and step < self.steps:
                raise RuntimeError(f"{self.outcome.strikes[-1].kind} did not show within {since:.0f} s")
            return False
        near = step % CHECKPOINT_EVERY in (0, CHECKPOINT_EVERY - 1)
        if near or len(checkpoints) < 2 or step > self.steps - LAST_STEPS:
            return False
        self._signs = self._signs_of_life()
        kind, victim = next(self._order), self.chance.choice(beats)
        self.outcome.strikes.append(Strike(kind, time.time(), step, victim.rank))
        self.kinds[kind](victim)
        print(f"{time.strftime('%T')} after step {step}: {kind} (rank {victim.rank})", flush=True)
        return True

    def _inside(self, victim: Beat, what: str) -> None:
        inside.order(self.run_dir.parent, victim.rank, what)

    def _damage(self, victim: Beat, change: Callable[[bytes], bytes]) -> None:
        """A part of the newest checkpoint is damaged, and a rank dies, so that it is needed."""
        os.kill(victim.pid, signal.SIGKILL)
        part = self.chance.choice(sorted(self._checkpoints()[-1].glob("part-*")))
        part.write_bytes(change(part.read_bytes()))

    def _flip(self, content: bytes) -> bytes:
        changed = bytearray(content)
        changed[self.chance.randrange(len(changed))] ^= 1 << self.chance.randrange(8)
        return bytes(changed)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.run_dir / "checkpoints").glob("step-????????"))

    def _beats(self) -> list[Beat]:
        directories = sorted(self.scratch.glob("ardist-*"), key=lambda path: path.stat().st_mtime)
        try:
            return [beat for beat in read_beats(directories[-1]) if beat.exit_code is None] if directories else []
        except (FileNotFoundError, ValueError):
            return []  # the attempt ended while it was looked at

    def _signs_of_life(self) -> int:
        """First steps of attempts and steps after an incident within a rank: one more after every fault."""
        starts = [record for record in goodput.read(self.run_dir) if record["event"] == "first_step"]
        return len(starts) + len([entry for entry in self._book() if entry["happened"] in ("next step", "went on")])

    def _book(self) -> list[dict[str, Any]]:
        path = self.run_dir.parent / inside.BOOK
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _compare(self, quiet: Path) -> None:
        mine, theirs = weights(self.run_dir), weights(quiet)
        self.outcome.equal = {
            "weights": all(torch.equal(mine[name], theirs[name]) for name in theirs) and mine.keys() == theirs.keys(),
            "losses": losses(self.run_dir) == losses(quiet),
            "sample ids": sample_ids(self.run_dir) == sample_ids(quiet),
        }
        self.outcome.summary = json.loads((self.run_dir / "summary.json").read_text())
        said = (self.run_dir.parent / "stderr-0").read_text()
        self.outcome.fallbacks, self.outcome.rollbacks, self.outcome.failed_saves = (
            len(re.findall(rf"\b{name} ", said))
            for name in ("checkpoint.fallback", "training.rollback", "checkpoint.failed")
        )

    def _reckon(self) -> None:
        """What each fault cost, from the supervisor's book and that of the ranks: one line of wall clock."""
        lines = sorted([*goodput.read(self.run_dir), *self._book()], key=lambda line: float(line["time"]))
        ends = [strike.time for strike in self.outcome.strikes[1:]] + [float("inf")]
        for strike, end in zip(self.outcome.strikes, ends, strict=True):
            for line in [line for line in lines if strike.time <= line["time"] < end]:
                self._add(strike, line)

    def _add(self, strike: Strike, line: dict[str, Any]) -> None:
        """Take the next line of the books after a fault into account."""
        happened = line.get("happened") or line["event"]
        if happened == "struck":
            strike.time, strike.step = line["time"], line["step"]
        elif happened == "end" and line.get("failed") is not None:
            # Seconds on the supervisor's clock; those since the discovery are taken off the line's wall time.
            noticed = line["time"] - (line["ended"] - line["failed"] - line["detect_seconds"])
            if "half way" in strike.kind:  # ordered for the next checkpoint: it counts from the last sign of life
                strike.time = noticed - line["detect_seconds"]
            if strike.noticed_seconds is None:
                strike.noticed_seconds, strike.detail = max(0.0, noticed - strike.time), line["detail"]
            strike.step = max(strike.step, line["step"] or 0)
            strike.shown_as = strike.shown_as or line["cause"]
        elif happened == "end":
            strike.shown_as = strike.shown_as or line["cause"]
        elif happened == "went back":
            strike.noticed_seconds, strike.shown_as = line["time"] - strike.time, "rollback"
            strike.steps_again = line["again"]
        elif happened == "went on":
            strike.back_seconds, strike.steps_again, strike.shown_as = 0.0, 0, "save failed"
        elif happened in ("first_step", "next step") and strike.back_seconds is None:
            strike.back_seconds = line["time"] - strike.time
            if happened == "first_step":
                strike.steps_again = max(0, strike.step - line["resumed_step"])
                strike.shown_as = strike.shown_as or "launcher gone"


def show(outcome: Outcome) -> None:
    """The tables."""
    print("\n| fault | times | shows as | noticed after | next step after | steps made again |")
    print("|---|---|---|---|---|---|")
    for kind, count in sorted(outcome.kinds.items()):
        strikes = [strike for strike in outcome.strikes if strike.kind == kind]
        shown = ", ".join(sorted({strike.shown_as for strike in strikes}))
        again = sum(strike.steps_again or 0 for strike in strikes)
        noticed = _mean([strike.noticed_seconds for strike in strikes])
        back = _mean([strike.back_seconds for strike in strikes])
        print(f"| {kind} | {count} | {shown} | {noticed} | {back} | {again} |")
    print("\ncause       times   detected   back after   lost steps")
    launches = outcome.summary["launches"]
    for cause, cost in launches["by_cause"].items():
        detect, back_after = cost["mean_detect_seconds"] or 0.0, cost["mean_restart_seconds"] or 0.0
        print(f"{cause:10} {cost['count']:6d} {detect:8.2f} s {back_after:10.2f} s {cost['lost_steps']:12d}")
    print(
        f"\n{len(outcome.strikes)} faults in {outcome.summary['step']} steps; {outcome.starts} starts of the launcher, "
        f"{launches['restarts']} restarts by it; goodput {launches['goodput']:.1%} of "
        f"{launches['wall_seconds']:.0f} s; rollbacks {outcome.rollbacks}, checkpoints fallen back from "
        f"{outcome.fallbacks}, saves that failed {outcome.failed_saves}"
    )
    for name, same in outcome.equal.items():
        print(f"{name}: {'equal to the quiet run' if same else 'DIFFERENT from the quiet run'}")


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.1f} s" if known else "-"


def main() -> int:
    """The command line."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--minutes", type=float, default=10.0)
    words.add_argument("--every", type=float, default=30.0, help="seconds between faults, on average")
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="punisher-") as directory:
        outcome = Punisher(Path(directory), seconds=60 * options.minutes, every=options.every, seed=options.seed).run()
    show(outcome)
    return 0 if all(outcome.equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
