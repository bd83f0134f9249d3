"""The faults of the punisher that strike inside a rank: losses, weights, replicas, and its part of a checkpoint.

A file ``inside-RANK`` in `directory` says what to do and is taken once; what came of it goes to ``inside.jsonl``.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from ardist import fault
from ardist.events import events
from ardist.training.callbacks import Callback
from ardist.training.run_dir import append_line
from ardist.training.trainer import Trainer

NAN_LOSSES, NAN_WEIGHT, FLIP, KILL_SAVE, FULL_DISK = "nan losses", "nan weight", "flip", "kill save", "full disk"
BOOK = "inside.jsonl"
NO_SPACE = 28


def order(directory: Path, rank: int, what: str) -> None:
    """Have `rank` do it after one of its next steps."""
    temporary = directory / f".inside-{rank}"
    temporary.write_text(what)
    temporary.replace(directory / f"inside-{rank}")


class Saboteur(Callback):
    """The last callback of a step, so that it sees a step that was taken back."""

    def __init__(self, directory: Path, checkpoint_every: int, seed: int) -> None:
        self.directory = directory
        self.every = checkpoint_every
        self.chance = random.Random(seed)
        self.pace = ""
        self.under_way: str | None = None
        self.last_step = 0
        self.went_back = False
        self.failed_saves = 0

    def on_start(self, trainer: Trainer) -> None:
        """Remember what the environment asks of every rank."""
        self.pace = os.environ.get(fault.VARIABLE, "")
        self.last_step = trainer.step

    def after_step(self, trainer: Trainer) -> None:
        """See what became of the last order, then look for a new one."""
        if self.went_back:
            self._note(trainer, "next step")
            self.went_back = False
        if self.under_way in (NAN_LOSSES, NAN_WEIGHT) and trainer.step < self.last_step:
            self._calm()
            self._note(trainer, "went back", again=self.last_step + 1 - trainer.step)
            self.went_back = True
        if self.under_way == FULL_DISK and events.snapshot().get("checkpoint.failed", 0) > self.failed_saves:
            self._calm()
            self._note(trainer, "went on")
        self.last_step = trainer.step
        path = self.directory / f"inside-{trainer.world.rank}"
        if self.under_way is None and path.exists() and self._start(path.read_text(), trainer):
            path.unlink()

    def _start(self, what: str, trainer: Trainer) -> bool:
        """False where the order does not fit yet."""
        if what == NAN_LOSSES:
            # A checkpoint between the two steps that are skipped would hold the first skip.
            if (trainer.step + 1) % self.every == 0:
                return False
            self._arm("value@trainer.loss:nan")
        elif what == NAN_WEIGHT:
            self._weight(trainer).fill_(float("nan"))
        elif what == FLIP:
            # Bits of the mantissa: a small change that no other check could notice.
            self._weight(trainer).view(torch.int32).bitwise_xor_(1 << self.chance.randrange(10, 23))
        elif what == KILL_SAVE:
            self._arm("kill@checkpoint.half_part")
        else:
            self.failed_saves = events.snapshot().get("checkpoint.failed", 0)
            self._arm(f"raise@checkpoint.before_part:{NO_SPACE}")
        self.under_way = what
        self._note(trainer, "struck")
        return True

    @torch.no_grad()
    def _weight(self, trainer: Trainer) -> torch.Tensor:
        """One number of this rank's replica, as a view; not a tiny one, whose change the next update would swallow."""
        flats = [parameter.detach().view(-1) for parameter in trainer.engine.module.parameters()]
        flat = self.chance.choice([flat for flat in flats if bool((flat.abs() > 1e-3).any())])
        place = self.chance.choice((flat.abs() > 1e-3).nonzero().view(-1).tolist())
        return flat[place : place + 1]

    def _arm(self, planned: str) -> None:
        os.environ[fault.VARIABLE] = ";".join(filter(None, (self.pace, planned)))

    def _calm(self) -> None:
        os.environ[fault.VARIABLE] = self.pace
        self.under_way = None

    def _note(self, trainer: Trainer, happened: str, **details: Any) -> None:
        record = {"time": time.time(), "happened": happened, "rank": trainer.world.rank, "step": trainer.step}
        append_line(self.directory / BOOK, record | details)
