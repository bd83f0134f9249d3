"""Which process it was: a process id comes again, and the time of day at which one began moves when the clock is set.

What psutil calls the time of creation is counted from the boot, whose time of day the kernel derives from the present
one: after a clock is set the same process has another one. So the ticks since the boot are taken where they are told.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import psutil

_START_TIME = 19
"""Index of ``starttime`` in /proc/PID/stat behind the command's name, which is the second field and may hold blanks."""


def began(pid: int) -> float:
    """When a process began, on a clock that nobody sets; `psutil.NoSuchProcess` when there is none."""
    path = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return float(path.read_text(errors="replace").rpartition(")")[2].split()[_START_TIME])
        raise psutil.NoSuchProcess(pid)
    return float(psutil.Process(pid).create_time())


def is_running(pid: int, since: float) -> bool:
    """True while the process that `began` said `since` of exists and is no zombie."""
    try:
        return began(pid) == since and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def machine_id() -> str:
    """The same for two processes exactly if one kernel runs both, whatever their host names say (Linux)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
