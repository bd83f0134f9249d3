"""Training under fire: a random fault about every half minute, nobody to help, and the result of a quiet run.

    python benchmarks/punisher.py [--minutes 10] [--every 30] [--seed 0]

Two gloo ranks train a tiny denoiser under the supervisor of launchers/train.sh. Processes are killed, stopped, crashed
and asked to leave, checkpoints are damaged, losses become NaN, the launcher itself is killed. What a queue would do is
done here too: a job that left with 75, or whose launcher died, is started again. At the end the weights, the losses and
the sample ids must be those of a run that nothing happened to; what every kind of fault cost is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "launch"), str(TESTS / "distributed")]

import torch  # noqa: E402
from fork_ranks import TrainingJob  # noqa: E402
from tiny import losses, sample_ids, weights, write_latents  # noqa: E402

from ardist.errors import Preempted  # noqa: E402
from ardist.training import goodput  # noqa: E402
from ardist.training.heartbeat import Beat, read_beats  # noqa: E402

CHECKPOINT_EVERY = 10
STEP_SECONDS = 0.5
LAUNCHER_KILLED = -signal.SIGKILL


@dataclass
class Outcome:
    """What the run went through, and whether it shows."""

    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    equal: dict[str, bool] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Punisher:
    """One run, one source of chance."""

    def __init__(self, directory: Path, *, seconds: float, every: float, seed: int) -> None:
        self.directory = directory
        self.scratch = directory / "scratch"
        self.scratch.mkdir(parents=True)
        self.every = every
        self.end = seconds
        self.chance = random.Random(seed)
        self.data = write_latents(directory / "latents")
        self.changes: dict[str, Any] = {
            "training__steps": max(40, int(0.75 * seconds)),
            "checkpoint__every": CHECKPOINT_EVERY,
            "training__max_skipped_in_row": 2,
            "launch": {"restart_pause_seconds": 0.1, "heartbeat_seconds": 8, "step_seconds": 15, "data_seconds": 15},
        }
        self.outcome = Outcome()
        self.run_dir = directory / "job" / "run"
        self.launcher = 0

    def run(self) -> Outcome:
        """The quiet run, the punished run, the comparison."""
        quiet = TrainingJob(self.directory / "quiet", self.data, **self.changes)
        if quiet.run() != 0:
            raise RuntimeError(quiet.stderr())
        began = time.monotonic()
        self._start()
        strike = began + self.every / 2
        while True:
            pid, status = os.waitpid(self.launcher, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if code == 0:
                    break
                if code not in (Preempted.exit_code, LAUNCHER_KILLED):
                    raise RuntimeError(f"the launcher ended with exit code {code}")
                self._start()
            if strike < time.monotonic() < began + self.end and self._strike():
                strike = time.monotonic() + self.every * self.chance.uniform(0.7, 1.3)
            time.sleep(0.05)
        self._compare(quiet.run_dir)
        return self.outcome

    def _start(self) -> None:
        """A launcher of its own process, as the queue would start it."""
        self.outcome.starts += 1
        self.launcher = os.fork()
        if self.launcher == 0:
            tempfile.tempdir = str(self.scratch)
            job = TrainingJob(self.directory / "job", self.data, faults=self._planned, **self.changes)
            code = 1
            try:
                code = job.run()
            finally:
                os._exit(code)

    def _planned(self, attempt: int) -> str:
        """Pace; in every third attempt two NaN losses in a row, in its third and fourth step: back to the checkpoint.

        Not where there is none to go back to, nor where one would be taken between the two: it would hold the skip.
        """
        pace = f"sleep@trainer.batch:{STEP_SECONDS}"
        newest = [int(path.name[5:]) for path in sorted(self.run_dir.glob("checkpoints/step-????????"))[-2:]]
        if attempt % 3 != 2 or not newest or any((step + 3) % CHECKPOINT_EVERY == 0 for step in newest):
            return pace
        # Two micro-batches of a step on each rank: visits 5 to 8 are steps 3 and 4.
        return f"{pace};value@trainer.loss/0#5:nan;value@trainer.loss/0#7:nan"

    def _strike(self) -> bool:
        """One random fault; False when there is nothing to hit yet."""
        beats = self._beats()
        if len(beats) < 2 or any(beat.first_step is None or beat.step <= beat.first_step for beat in beats):
            return False
        victim = self.chance.choice(beats)
        kinds: dict[str, Callable[[Beat], None]] = {
            "A1 kill -9 a rank": lambda beat: os.kill(beat.pid, signal.SIGKILL),
            "A4 crash a rank": lambda beat: os.kill(beat.pid, signal.SIGSEGV),
            "A5 stop a rank": lambda beat: os.kill(beat.pid, signal.SIGSTOP),
            "A10 TERM to a rank": lambda beat: os.kill(beat.pid, signal.SIGTERM),
            "A10 USR1 to the launcher": lambda beat: os.kill(self.launcher, signal.SIGUSR1),
            "A13 kill -9 the launcher": lambda beat: os.kill(self.launcher, signal.SIGKILL),
            "B1 damage the newest checkpoint": self._damage,
        }
        kind = self.chance.choice(list(kinds))
        kinds[kind](victim)
        self.outcome.faults[kind] += 1
        print(f"{time.strftime('%T')} after step {max(beat.step for beat in beats)}: {kind}", flush=True)
        return True

    def _damage(self, victim: Beat) -> None:
        """A bit of the newest checkpoint flips, and a rank dies, so that it is needed."""
        os.kill(victim.pid, signal.SIGKILL)
        checkpoints = sorted((self.run_dir / "checkpoints").glob("step-????????"))
        if len(checkpoints) > 1:
            part = self.chance.choice(sorted(checkpoints[-1].glob("part-*")))
            content = bytearray(part.read_bytes())
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            part.write_bytes(content)

    def _beats(self) -> list[Beat]:
        directories = sorted(self.scratch.glob("ardist-*"), key=lambda path: path.stat().st_mtime)
        try:
            return [beat for beat in read_beats(directories[-1]) if beat.exit_code is None] if directories else []
        except (FileNotFoundError, ValueError):
            return []  # the attempt ended while it was looked at

    def _compare(self, quiet: Path) -> None:
        mine, theirs = weights(self.run_dir), weights(quiet)
        self.outcome.equal = {
            "weights": all(torch.equal(mine[name], theirs[name]) for name in theirs) and mine.keys() == theirs.keys(),
            "losses": losses(self.run_dir) == losses(quiet),
            "sample ids": sample_ids(self.run_dir) == sample_ids(quiet),
        }
        records = goodput.read(self.run_dir)
        self.outcome.rows = goodput.restarts(records)
        self.outcome.summary = json.loads((self.run_dir / "summary.json").read_text())


def show(outcome: Outcome) -> None:
    """The tables."""
    print("\nfault                              times")
    for kind, count in sorted(outcome.faults.items()):
        print(f"{kind:34} {count:5d}")
    print("\ncause       times   detected   back after   lost steps")
    launches = outcome.summary["launches"]
    for cause, cost in launches["by_cause"].items():
        detect, back = cost["mean_detect_seconds"] or 0.0, cost["mean_restart_seconds"] or 0.0
        print(f"{cause:10} {cost['count']:6d} {detect:8.2f} s {back:10.2f} s {cost['lost_steps']:12d}")
    print(
        f"\n{outcome.starts} starts of the launcher, {launches['restarts']} restarts by it; goodput "
        f"{launches['goodput']:.1%} of {launches['wall_seconds']:.0f} s; rollbacks "
        f"{outcome.summary['events'].get('training.rollback', 0)}, checkpoints fallen back from "
        f"{outcome.summary['events'].get('checkpoint.fallback', 0)}"
    )
    for name, same in outcome.equal.items():
        print(f"{name}: {'equal to the quiet run' if same else 'DIFFERENT from the quiet run'}")


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
