"""The supervisor's hand on another machine: ``python -m ardist.launch.agent``, over the pipes of a remote shell.

It starts, watches and kills the ranks there, and does so by itself when the supervisor is not heard any more: a machine
that was cut off must not go on training beside its own successor. Who ends a whole job (Slurm) signals every process of
it: the ranks save, so the agent stays for as long as they do.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from ardist import log
from ardist.code_digest import code_digest
from ardist.config import TrainConfig, load_config
from ardist.config.launch import LaunchConfig
from ardist.errors import ArdistError, HardwareError
from ardist.launch.engines import launches
from ardist.launch.local import check_port, count_gpus, hold_port, rank_environment
from ardist.launch.nodes import LocalNode
from ardist.launch.wire import decode, line, pack_state, unpack_placement

REPORT_SECONDS = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Agent:
    """One connection: greet, start once, report until told to end or left alone."""

    def __init__(self) -> None:
        self._limits = LaunchConfig()
        self._node: LocalNode | None = None
        self._outbox: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=20)
        self._heard = time.monotonic()
        self._signalled = False
        self._holder: socket.socket | None = None
        self._out = os.dup(sys.stdout.fileno())
        # Ranks and libraries may print; the pipe is for messages only.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        threading.Thread(target=self._write, daemon=True).start()

    def run(self) -> int:
        """Serve until the end; returns the agent's own exit code."""
        buffer = b""
        reported = 0.0
        for number in SIGNALS:
            # Not SIG_IGN, which the ranks and their helpers would inherit.
            signal.signal(number, self._receive)
        try:
            while time.monotonic() - self._heard < self._limits.node_seconds:
                ready, _, _ = select.select([sys.stdin.fileno()], [], [], REPORT_SECONDS / 2)
                if ready:
                    data = os.read(sys.stdin.fileno(), 65536)
                    if not data:
                        self._let_save()
                        return HardwareError.exit_code  # the supervisor is gone
                    *complete, buffer = (buffer + data).split(b"\n")
                    for text in complete:
                        if not self._obey(json.loads(text)):
                            return 0
                    # Not before: to obey may take longer than the supervisor may be silent.
                    self._heard = time.monotonic()
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    self._report()
            return HardwareError.exit_code
        finally:
            if self._node is not None:
                self._node.kill()
            self._flush()

    def answer(self, word: str) -> int:
        """Greet whoever can only give one word on the command line, and leave."""
        self._greet(decode(word))
        self._flush()
        return 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _let_save(self) -> None:
        """Ranks that were signalled with us, and with the connection, have the time to save."""
        end = time.monotonic() + self._limits.grace_seconds
        while self._signalled and self._node is not None and time.monotonic() < end:
            state = self._node.state()
            if state.exit_code is not None or state.failure is not None:
                return
            time.sleep(REPORT_SECONDS)

    def _obey(self, message: Mapping[str, Any]) -> bool:
        word = message["do"]
        if word == "greet":
            self._greet(message)
        elif word == "start":
            self._start(message)
        elif word == "signal" and self._node is not None:
            self._node.send_signal(int(message["number"]))
        elif word == "stacks" and self._node is not None:
            self._say({"stacks": self._node.stacks()})
        elif word == "end":
            return False
        return True

    def _greet(self, message: Mapping[str, Any]) -> None:
        """Tell what must agree between machines before anything is started."""
        os.environ.update(message["environment"])
        problem, digest = None, None
        try:
            config = load_config(TrainConfig, message["config"], message["overrides"])
            self._limits, digest = config.launch, config.digest()
        except ArdistError as error:
            problem = str(error)
        busy = None
        if message["port"] is not None:
            try:
                check_port(message["port"])
            except HardwareError as error:
                busy = str(error)
        self._holder = hold_port(0)  # for as long as we are there: the ranks may meet on it
        self._say(
            {
                "hello": socket.gethostname(), "code": code_digest(), "config": digest, "problem": problem,
                "busy": busy, "gpus": count_gpus(), "free_port": self._holder.getsockname()[1],
                "time": time.time(),
            }
        )  # fmt: skip

    def _start(self, message: Mapping[str, Any]) -> None:
        placement = unpack_placement(message["placement"])
        self._node = LocalNode(placement.hosts[placement.node].name, self._limits, message["program"][0])
        self._node.watched = placement.local_size
        started = launches(message["engine"], placement, message["program"], self._node.scratch, debug=message["debug"])
        environment = rank_environment(placement.local_size, placement.hosts[placement.node].name)
        self._node.start(started, environment | message["environment"])

    def _report(self) -> None:
        self._say({"state": None if self._node is None else pack_state(self._node.state())})

    def _say(self, message: dict[str, Any]) -> None:
        # With nobody at the other end the pipe fills; old news is worth nothing then.
        with contextlib.suppress(queue.Full):
            self._outbox.put_nowait(message)

    def _write(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            while True:
                data = line(self._outbox.get())
                while data:
                    data = data[os.write(self._out, data) :]
                self._outbox.task_done()

    def _flush(self) -> None:
        end = time.monotonic() + 1
        while self._outbox.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.02)


def main() -> int:
    """The program; with a word it only answers that."""
    log.configure()
    return Agent().run() if len(sys.argv) == 1 else Agent().answer(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
