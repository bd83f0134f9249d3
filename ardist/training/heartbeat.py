"""A rank's sign of life: a small file, mapped into memory, that a watchdog outside the process reads.

The loop only stores numbers in the mapping, which costs no system call and survives any death of the process. A thread
stores the time twice a second, so that a process that is stopped, or that holds the interpreter's lock, is told apart
from one that waits.
"""

from __future__ import annotations

import enum
import faulthandler
import json
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ardist.process_identity import began, is_running

DIRECTORY_VARIABLE = "ARDIST_HEARTBEATS"
INTERVAL = 0.5
_HEADER, _NUMBERS, _TEXT = 512, 128, 2048
_FIELDS = ["beat_ns", "progress", "progress_ns", "step", "first_step", "phase", "exit_code", "ended_ns"]
_OFFSETS = {name: _HEADER + 8 * index for index, name in enumerate(_FIELDS)}
RUNNING = -1


class Phase(enum.IntEnum):
    """What a rank is at."""

    START = 0
    DATA = 1
    STEP = 2
    OTHER = 3
    END = 4

    @property
    def words(self) -> str:
        """For messages."""
        return ("starting", "waiting for data", "in a step", "in validation or a checkpoint", "at the end")[self]


def dump_signal() -> int:
    """The signal that makes a rank write the stacks of all its threads; handled below the interpreter."""
    return int(getattr(signal, "SIGRTMIN", signal.SIGPROF)) + (4 if hasattr(signal, "SIGRTMIN") else 0)


class Heartbeat:
    """Written by one rank. Until `start` it keeps its numbers to itself."""

    def __init__(self) -> None:
        self._map: mmap.mmap | bytearray = bytearray(_HEADER + _NUMBERS + _TEXT)
        self._stacks: IO[str] | None = None
        self._phase = Phase.START
        self._progress = 0

    def start(self, directory: Path, rank: int) -> None:
        """Begin to beat in `directory`, and write stacks there on `dump_signal` and on a native crash."""
        path = beat_path(directory, rank)
        header = {
            "rank": rank,
            "pid": os.getpid(),
            "created": began(os.getpid()),
            "host": socket.gethostname(),
        }
        content = bytearray(_HEADER + _NUMBERS + _TEXT)
        content[:_HEADER] = json.dumps(header).encode().ljust(_HEADER)
        now = time.monotonic_ns()
        for name, value in (("beat_ns", now), ("progress_ns", now), ("first_step", RUNNING), ("exit_code", RUNNING)):
            struct.pack_into("<q", content, _OFFSETS[name], value)
        # Stacks first: whoever sees the beat may ask for them at once.
        self._stacks = open(stacks_path(directory, rank), "a", encoding="utf-8")  # noqa: SIM115  (until the end)
        faulthandler.enable(self._stacks)
        faulthandler.register(dump_signal(), self._stacks, all_threads=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        with open(temporary, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), len(content))
        temporary.replace(path)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def start_from_environment(self) -> None:
        """Beat if a watchdog asked for it."""
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if directory and Path(directory).is_dir():
            self.start(Path(directory), int(os.environ.get("RANK", "0")))

    def _beat(self) -> None:
        while self._get("exit_code") == RUNNING:
            self._set("beat_ns", time.monotonic_ns())
            time.sleep(INTERVAL)

    def enter(self, phase: Phase) -> None:
        """Tell what the rank does now; any change is progress."""
        self._phase = phase
        self._set("phase", phase)
        self.advance()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Be in `phase`, then in the one before again."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def advance(self) -> None:
        """Tell that something went on within a long phase."""
        self._progress += 1
        self._set("progress", self._progress)
        self._set("progress_ns", time.monotonic_ns())

    def resumed(self, step: int) -> None:
        """Tell after which step this process takes over."""
        self._set("step", step)
        self._set("first_step", step)
        self.advance()

    def stepped(self, step: int) -> None:
        """Tell that a step is complete; from the first one on the rank is in `Phase.STEP`."""
        self._set("step", step)
        self.enter(Phase.STEP)

    def end(self, exit_code: int, message: str = "") -> None:
        """The last word: why this rank ends."""
        # The tail of a long message holds the error itself.
        text = message.encode()[-_TEXT + 1 :]
        self._map[_HEADER + _NUMBERS : _HEADER + _NUMBERS + len(text)] = text
        self._set("ended_ns", time.monotonic_ns())
        self._set("exit_code", exit_code)

    def _set(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._map, _OFFSETS[name], value)

    def _get(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._map, _OFFSETS[name])[0])


@dataclass(frozen=True)
class Beat:
    """What a rank last told; times are the machine's monotonic clock in seconds, `exit_code` is None while it runs."""

    rank: int
    pid: int
    created: float
    host: str
    beat: float
    progress: int
    progress_time: float
    step: int
    first_step: int | None
    phase: Phase
    exit_code: int | None
    ended: float
    message: str

    @property
    def alive(self) -> bool:
        """True while its process exists and is no zombie."""
        return is_running(self.pid, self.created)


def beat_path(directory: Path, rank: int) -> Path:
    """The file of a rank."""
    return directory / f"rank-{rank:05d}.beat"


def stacks_path(directory: Path, rank: int) -> Path:
    """Where a rank's stacks are written."""
    return directory / f"stacks-rank-{rank:05d}.txt"


def read_beats(directory: Path) -> list[Beat]:
    """What the ranks in `directory` last told, in rank order."""
    return [_read(path) for path in sorted(directory.glob("rank-*.beat"))]


def _read(path: Path) -> Beat:
    content = path.read_bytes()
    header = json.loads(content[:_HEADER])
    numbers = {name: int(struct.unpack_from("<q", content, offset)[0]) for name, offset in _OFFSETS.items()}
    return Beat(
        **header,
        beat=numbers["beat_ns"] / 1e9,
        progress=numbers["progress"],
        progress_time=numbers["progress_ns"] / 1e9,
        step=numbers["step"],
        first_step=None if numbers["first_step"] == RUNNING else numbers["first_step"],
        phase=Phase(numbers["phase"]),
        exit_code=None if numbers["exit_code"] == RUNNING else numbers["exit_code"],
        ended=numbers["ended_ns"] / 1e9,
        message=content[_HEADER + _NUMBERS :].rstrip(b"\0").decode(errors="replace"),
    )


heartbeat = Heartbeat()
"""The heartbeat of this process."""
