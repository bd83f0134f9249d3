"""Reusable probe children, each killed and replaced when a video makes it hang, flood or die."""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from ardist.events import events
from data_tools.damage import Interval
from data_tools.probe import ProbeCaps, VideoFacts
from data_tools.reasons import Reason, Refusal
from data_tools.sandbox import kill_group

MAX_ANSWER = 4 * 2**20
SLOWEST_BYTES_PER_SECOND = 20e6
SLOWEST_SECONDS_PER_FRAME = 0.1
"""Added to the timeout for the bytes, or the frames, that have to be gone through."""

REQUESTS_PER_CHILD = 1000
"""A child is replaced after this many videos, so that a leak in a demuxer stays small."""


class ProbeChild:
    """One child process; `probe` never waits longer than its time limit."""

    def __init__(self, *, timeout: float = 60.0, memory: int = 2 * 2**30) -> None:
        self._timeout, self._memory = timeout, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._served = 0

    def probe(self, path: str, version: str | None, caps: ProbeCaps, size: int = 0) -> VideoFacts:
        """Facts about one video of `size` bytes; raises `Refusal`, also for a video that kills the child."""
        request = {"what": "probe", "path": path, "version": version, "caps": asdict(caps)}
        return VideoFacts.from_json(self._ask(request, self._timeout + size / SLOWEST_BYTES_PER_SECOND)["facts"])

    def damage(self, path: str, version: str | None, facts: VideoFacts, max_pixels: int) -> list[Interval]:
        """Damaged intervals of a video; raises `Refusal` when it cannot be opened or kills the child."""
        request = {"what": "damage", "path": path, "version": version, "stream": facts.stream, "max_pixels": max_pixels}
        found = self._ask(request, self._timeout + facts.count * SLOWEST_SECONDS_PER_FRAME)["damage"]
        return [(Fraction(start), None if end is None else Fraction(end)) for start, end in found]

    def _ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        if self._served >= REQUESTS_PER_CHILD:
            self.close()
        process = self._process or self._start()
        self._served += 1
        request["cpu_seconds"] = max(1, int(patience))
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            fields = json.loads(self._answer(process, patience))
        except (OSError, EOFError, ValueError) as error:
            raise self._post_mortem(process, error, patience) from None
        if "reason" in fields:
            raise Refusal(Reason(fields["reason"]), fields["detail"])
        return dict(fields)

    def __enter__(self) -> ProbeChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            kill_group(self._process)
        self._process, self._served = None, 0

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "data_tools.probe_child", str(self._memory), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], patience: float) -> bytes:
        assert process.stdout is not None
        deadline = time.monotonic() + patience
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                piece = process.stdout.read1(2**16)  # type: ignore[attr-defined]
                if not piece:
                    raise EOFError
                received += piece
                if len(received) > MAX_ANSWER:
                    raise ValueError("flood")
        return bytes(received)

    def _post_mortem(self, process: subprocess.Popen[bytes], error: Exception, patience: float) -> Refusal:
        if isinstance(error, TimeoutError):
            self.close()
            events.count("build.child_killed", stage="probe", reason="timeout")
            return Refusal(Reason.TIMEOUT, f"probing took longer than {patience:.0f} s")
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        events.count("build.child_died", stage="probe", status=status)
        if status is not None and -status == signal.SIGXCPU:
            return Refusal(Reason.TIMEOUT, f"probing used more than {patience:.0f} s of processor time")
        return Refusal(Reason.CRASHED, f"the probe died ({_status(status)})")


def _status(status: int | None) -> str:
    if status is None:
        return "it answered nonsense"
    if status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"


def probe_all(
    requests: Iterable[tuple[str, str | None, int]], caps: ProbeCaps, workers: int, timeout: float
) -> Iterator[VideoFacts | Refusal]:
    """Probe (path, version, bytes) triples with `workers` children, in order."""
    children: queue.SimpleQueue[ProbeChild] = queue.SimpleQueue()
    all_children = [ProbeChild(timeout=timeout) for _ in range(workers)]
    for child in all_children:
        children.put(child)

    def one(request: tuple[str, str | None, int]) -> VideoFacts | Refusal:
        child = children.get()
        path, version, size = request
        try:
            return child.probe(path, version, caps, size)
        except Refusal as refusal:
            return refusal
        finally:
            children.put(child)

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="probe") as pool:
            yield from pool.map(one, requests)
    finally:
        for child in all_children:
            child.close()
