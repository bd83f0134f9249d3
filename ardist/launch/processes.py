"""All processes of a job, found by a mark in their environment: parents may be dead, sessions and groups differ.

Standard library only and started as a program: it outlives the launcher. ``python processes.py FD MARK GRACE`` waits
until the pipe FD closes, which it does however the launcher dies, and leaves no process of the job behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

VARIABLE = "ARDIST_JOB"
KILL_SECONDS = 10.0


def members(mark: str) -> list[int]:
    """Process ids whose environment had ``ARDIST_JOB=mark`` when they started (Linux; none elsewhere)."""
    wanted, found = f"{VARIABLE}={mark}".encode(), []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue  # it ended, or belongs to another user
    return found


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill(mark: str, seconds: float = KILL_SECONDS) -> list[int]:
    """Kill every process of a job and wait until they are gone; returns those that are still there."""
    end = time.monotonic() + seconds
    while True:
        left = members(mark)
        send(left, signal.SIGKILL)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


def guard(descriptor: int, mark: str, grace: float) -> None:
    """Wait for the launcher's end; then give the job `grace` seconds to save, and kill what is left of it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1):
            pass
    end = time.monotonic() + grace
    while time.monotonic() < end and members(mark):
        time.sleep(0.2)
    kill(mark)


if __name__ == "__main__":
    guard(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
