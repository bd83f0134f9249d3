"""Limits for processes that touch foreign bytes: memory, CPU time, file size, descriptors, life span."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass

ALLOWED_FORMATS = (
    "mov",
    "mp4",
    "matroska",
    "webm",
    "avi",
    "mpegts",
    "mpeg",
    "mpegvideo",
    "flv",
    "asf",
    "ogg",
    "mxf",
    "ivf",
    "nut",
    "yuv4mpegpipe",
    "dv",
    "gif",
)
"""Demuxers a video may need. Not among them on purpose: playlists and everything that opens other files."""

PROTOCOLS = "file,pipe"

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


@dataclass(frozen=True)
class Limits:
    """What a child process may use."""

    memory: int = 4 * 2**30
    cpu_seconds: int = 600
    file_bytes: int = 0
    descriptors: int = 64


def limit_child(pid: int, limits: Limits) -> None:
    """Apply the limits to a child that has just been started (Linux); it can only lower them further."""
    if not hasattr(resource, "prlimit"):
        return
    # The child may already have ended: then there is nothing left to limit.
    with contextlib.suppress(ProcessLookupError):
        for kind, value in _pairs(limits):
            resource.prlimit(pid, kind, (value, value))


def limit_self(limits: Limits) -> None:
    """Apply the limits to this process; it may gain no privileges from now on (Linux)."""
    for kind, value in _pairs(limits):
        resource.setrlimit(kind, (value, value))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(parent: int) -> None:
    """End this process when its parent, the process numbered `parent`, does (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _pairs(limits: Limits) -> list[tuple[int, int]]:
    return [
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.descriptors),
        (resource.RLIMIT_CORE, 0),
    ]


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a child started in its own session, with everything it started, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
