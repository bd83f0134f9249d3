"""Run a function in N gloo ranks: forked from a process that has imported torch and DeepSpeed once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ardist.events import events
from ardist.launch.local import hold_port
from ardist.training import distributed

distributed.prepare_environment()
# Imported once, here, so that a forked rank starts in milliseconds.
import deepspeed  # noqa: E402
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
from deepspeed.ops import __compatible_ops__  # noqa: E402

if "deepspeed_shm_comm" in __compatible_ops__:
    # Without this the first gloo rank compiles a shared-memory all-reduce for most of a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False

_context = multiprocessing.get_context("fork")


class RankError(AssertionError):
    """One or more ranks raised or died; the message holds their tracebacks."""


@dataclass
class Outcome:
    """What became of one rank: its value, or its traceback, and its exit code (negative: the signal that killed it)."""

    rank: int
    value: Any
    error: str | None
    exit_code: int | None


class Ranks:
    """N running ranks: signal them, then `wait` for their outcomes."""

    def __init__(
        self, function: Callable[..., Any], size: int, *args: Any, env: Mapping[str, str] | None = None
    ) -> None:
        # Held until the ranks have ended, so that nobody else is given the port before rank 0 listens there.
        self._holder = hold_port(0)
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._holder.getsockname()[1]),
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            **(env or {}),
        }
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(size):
            receiver, sender = _context.Pipe(duplex=False)
            rank_env = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=_main, args=(function, args, rank_env, sender), name=f"rank-{rank}")
            process.start()
            sender.close()
            self.pipes.append(receiver)
            self.processes.append(process)

    def send_signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = 200.0) -> list[Outcome]:
        """Outcomes in rank order; ranks still alive at the end of `timeout` are killed (exit code -9)."""
        end = time.monotonic() + timeout
        outcomes = []
        for rank, (process, pipe) in enumerate(zip(self.processes, self.pipes, strict=True)):
            value, error = None, None
            try:
                if pipe.poll(max(0.0, end - time.monotonic())):
                    # Written by our own forked child a moment ago.
                    value, error = pickle.loads(pipe.recv_bytes())  # noqa: S301
                else:
                    error = "timed out"
            except EOFError:
                error = "ended without a result"
            process.join(max(0.0, end - time.monotonic()) if error != "timed out" else 0.0)
            if process.exitcode is None:
                process.kill()
                process.join()
            if error is None and process.exitcode:
                error = f"exit code {process.exitcode} after its result"
            outcomes.append(Outcome(rank, value, error, process.exitcode))
        self._holder.close()
        return outcomes


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 200.0, env: Mapping[str, str] | None = None
) -> list[Any]:
    """`function(*args)` in `size` ranks; its values in rank order, or a `RankError` with every traceback."""
    outcomes = Ranks(function, size, *args, env=env).wait(timeout)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise RankError("\n".join(f"--- rank {o.rank} (exit code {o.exit_code})\n{o.error}" for o in failed))
    return [outcome.value for outcome in outcomes]


def _main(function: Callable[..., Any], args: tuple[Any, ...], env: Mapping[str, str], sender: Any) -> None:
    os.environ.update(env)
    events.clear()  # what the parent has counted is not this rank's
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        result, code = (function(*args), None), 0
    except BaseException:  # noqa: BLE001  (a test harness reports everything, SystemExit too)
        result, code = (None, traceback.format_exc()), 1
    sender.send_bytes(pickle.dumps(result))
    sender.close()
    distributed.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
