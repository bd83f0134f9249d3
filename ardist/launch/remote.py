"""The ranks of another machine, reached through a remote shell and the agent it starts there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ardist.errors import HardwareError
from ardist.events import events
from ardist.launch.nodes import State
from ardist.launch.watchdog import Failure
from ardist.launch.wire import line, unpack_placement, unpack_state

PING_SECONDS = 1.0
STACK_SECONDS = 5.0
END_SECONDS = 15.0
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")


def remote_words(shell: str, host: str, python: str, directory: str) -> list[str]:
    """The command line that starts an agent in `directory` of `host`; `shell` is ssh, srun, or a program like ssh."""
    script = f"cd {shlex.quote(directory)} && exec {shlex.quote(python)} -m ardist.launch.agent"
    if shell == "srun":
        return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "bash", "-c", script]
    options = SSH_OPTIONS if os.path.basename(shell) == "ssh" else ()
    return [shell, *options, host, script]


class RemoteNode:
    """A machine and the connection to its agent."""

    def __init__(self, name: str, shell: str, node_seconds: float) -> None:
        self.name = name
        self.ranks = self.watched = 0
        self._seconds = node_seconds
        if os.path.basename(shell) == "pdsh":
            raise HardwareError(f"pdsh hands no input on, so {name} cannot be asked through it; choose ssh here")
        if shutil.which(shell) is None:
            raise HardwareError(f"{shell!r}, which is to reach {name}, is not on this machine")
        words = remote_words(shell, name, sys.executable, os.getcwd())
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
        )
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self._inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._state = State()
        self._began = self._heard = time.monotonic()
        for target in (self._read, self._write):
            threading.Thread(target=target, name=f"{target.__name__}-{name}", daemon=True).start()

    def greet(
        self,
        config: str,
        overrides: Sequence[str],
        environment: Mapping[str, str],
        *,
        port: int | None = None,
        seconds: float,
    ) -> dict[str, Any]:
        """What the machine is, and whether `port` is free there; raises `HardwareError` when it cannot be reached in
        time."""
        words = {"config": config, "overrides": list(overrides), "environment": dict(environment), "port": port}
        self._say({"do": "greet", **words})
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=0.2)
            if self._process.poll() is not None and self._inbox.empty():
                raise HardwareError(
                    f"machine {self.name} cannot be reached, or ardist does not start there: the remote shell ended "
                    f"with exit code {self._process.returncode}"
                )
        raise HardwareError(f"machine {self.name} did not answer within {seconds:g} s")

    def start(self, **order: Any) -> None:
        """Have the agent start its ranks."""
        placement = unpack_placement(order["placement"])
        self.ranks = self.watched = placement.local_size
        self._say({"do": "start", **order})

    def state(self) -> State:
        """What the agent last told, or that it is not heard any more."""
        state, silent = self._state, time.monotonic() - self._heard
        if state.exit_code is None and state.failure is None:
            ended = self._process.poll()
            if ended is not None:
                detail = f"the connection to machine {self.name} ended with exit code {ended}"
                state = State(state.beats, Failure("cut off", detail, host=self.name, seconds=silent))
            elif silent > self._seconds:
                detail = f"machine {self.name} gave no sign of life for {silent:.1f} s"
                step = max((beat.step for beat in state.beats), default=None)
                state = State([], Failure("cut off", detail, host=self.name, step=step, seconds=silent))
        return state

    def send_signal(self, number: int) -> None:
        """Have the agent pass it on."""
        self._say({"do": "signal", "number": number})

    def stacks(self) -> dict[str, str]:
        """Nothing from a machine that is cut off."""
        if time.monotonic() - self._heard > self._seconds or self._process.poll() is not None:
            return {}
        self._say({"do": "stacks"})
        try:
            return dict(self._inbox.get(timeout=STACK_SECONDS)["stacks"])
        except queue.Empty:
            return {}

    def kill(self) -> None:
        """The agent kills its ranks and leaves; one that is cut off does so by itself."""
        silent = time.monotonic() - self._heard
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.poll() is None and silent < self._seconds:
                self._say({"do": "end"})
                self._process.wait(END_SECONDS)
        self._outbox.put(None)
        self._process.kill()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            events.count("launch.not_killed", host=self.name, pid=self._process.pid)

    def _say(self, message: dict[str, Any]) -> None:
        self._outbox.put(line(message))

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            while True:
                try:
                    data = self._outbox.get(timeout=PING_SECONDS)
                except queue.Empty:
                    data = line({"do": "ping"})
                if data is None:
                    return
                while data:
                    data = data[self._process.stdin.write(data) or 0 :]

    def _read(self) -> None:
        assert self._process.stdout is not None
        buffer = b""
        while data := self._process.stdout.read(65536):
            *complete, buffer = (buffer + data).split(b"\n")
            for text in complete:
                try:
                    message = json.loads(text)
                except ValueError:
                    continue  # a login shell's greeting
                if not isinstance(message, dict):
                    continue
                self._heard = time.monotonic()
                if "state" not in message:
                    self._inbox.put(message)
                elif message["state"] is not None:
                    self._state = unpack_state(message["state"])
