"""Stopping on request: signals set a flag, all ranks agree on it, nobody waits for the agreement."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ardist import fault
from ardist.errors import HardwareError
from ardist.training.distributed import World

_log = logging.getLogger("ardist.training")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_DEBOUNCE_SECONDS = 2.0


class StopRequest:
    """A stop flag that a signal to any one rank raises on all of them.

    The first signal asks for: finish the step, save, leave with exit code 75. A second one, at least two seconds
    later (launchers and schedulers like to repeat themselves), ends the process at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.saved = False
        self._signal: int | None = None
        self._since = 0.0
        self._stopped = False
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals that ask for an end, except those the caller chose to ignore (as nohup does)."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)

    def uninstall(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
            return
        if not self.saved and time.monotonic() - self._since >= _DEBOUNCE_SECONDS:
            os._exit(128 + number)

    @property
    def name(self) -> str:
        """What asked for the end, for the log."""
        return signal.Signals(self._signal).name if self._signal is not None else "another rank"

    def agreed(self, step: int) -> bool:
        """True on all ranks at the same step, at most one step after the signal; call in every step (collective).

        The flags travel over the control group while the next step is computed, and with them every rank's `step`:
        raises `HardwareError` when the ranks do not make the same steps, before they wait for each other for ever.
        """
        if fault.point("stop.agreed") is not None:
            return False
        if self._stopped:
            return True
        if self.world.size == 1:
            return self._signal is not None
        stop = False
        if self._pending is not None:
            work, told = self._pending
            work.wait()
            flag, *steps = told.tolist()
            if len(set(steps)) > 1:
                shown = ", ".join(f"rank {rank} at step {at}" for rank, at in enumerate(steps))
                raise HardwareError(f"the ranks are out of step: {shown}; one of them left out a collective operation")
            stop = self._stopped = bool(flag)
        self._pending = None
        if not stop:
            mine = torch.zeros(1 + self.world.size, dtype=torch.int64)
            mine[0] = self._signal is not None
            mine[1 + self.world.rank] = step
            self._pending = (dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.world.control, async_op=True), mine)
        return stop

    def drain(self) -> None:
        """Wait for the agreement under way, before the control group is used for the last time."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
