"""What the last failure cost, told to metrics.jsonl and the trackers by the attempt that came after it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from ardist.training import goodput
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class Restarts(Callback):
    """Under a supervisor, once per attempt that follows a failure, at the first log point after its first step."""

    def __init__(self) -> None:
        self._waiting = goodput.JOB_VARIABLE in os.environ and not os.environ[goodput.JOB_VARIABLE].endswith(":1")

    def after_step(self, trainer: Trainer) -> None:
        if not self._waiting or not trainer.world.is_main or trainer.step % trainer.config.training.log_every:
            return
        rows = goodput.restarts(goodput.read(trainer.run.path))
        totals = goodput.summarise(trainer.run.path, trainer.history.useful_seconds)
        # The supervisor's line about our first step comes a moment after it.
        if not rows or rows[-1]["restart_seconds"] is None or totals is None:
            return
        self._waiting = False
        cost = {name: rows[-1][name] for name in ("cause", "detect_seconds", "restart_seconds", "lost_steps")}
        total = {"restarts": totals["restarts"], "goodput": totals["goodput"], "total_lost_steps": totals["lost_steps"]}
        trainer.records.write({"kind": "restart", "step": trainer.step, **cost, **total, "time": time.time()})
