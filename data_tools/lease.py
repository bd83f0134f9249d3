"""Leases keep two workers from doing the same work; only the commit decides whose counts.

A lease of generation g is the object ``leases/<work>.<g>.json``. It is taken by creating generation g + 1, which
exactly one worker can, and kept by rewriting it with a growing beat. No clocks are compared: a lease is stale when
its beat did not change for the lease time while we watched, or when its owner is a dead process of this machine.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardist import fault
from ardist.errors import ArdistError
from ardist.events import events
from ardist.storage import MissingObjectError, Storage
from data_tools import layout
from data_tools.cluster import cluster_task


@dataclass(frozen=True)
class Pace:
    """How long a silent lease is respected, and how often to look whether others have finished."""

    lease_seconds: float = 60.0
    poll_seconds: float = 1.0


def worker_name(label: str = "") -> str:
    """A name for this worker that no other has; its place in a cluster job comes first."""
    task = cluster_task()
    label = label or (task.label if task else "")
    return f"{label}{'@' if label else ''}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


class Leases:
    """Takes, keeps and releases the leases of one worker."""

    def __init__(self, out: Storage, worker: str, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self.worker, self._seconds, self._clock = out, worker, seconds, clock
        self._seen: dict[str, tuple[int, float]] = {}

    def take(self, what: str) -> Lease | None:
        """The lease of a piece of work, or None while another worker is alive on it."""
        prefix = f"{layout.LEASES}{what}."
        latest = max(self._out.list(prefix), default=None)
        generation = 0
        if latest is not None:
            generation = int(latest.removeprefix(prefix).removesuffix(".json"))
            if not self._stale(latest):
                return None
            events.count("build.lease_taken_over", work=what, generation=generation)
        name = f"{prefix}{generation + 1:04d}.json"
        lease = Lease(self._out, name, self.worker, self._seconds)
        return lease if lease.start() else None

    def _stale(self, name: str) -> bool:
        try:
            owner: dict[str, Any] = json.loads(self._out.read(name))
            beat = int(owner["beat"])
        except MissingObjectError:
            return False  # released between listing and reading: look again later
        except (ValueError, KeyError, TypeError):
            owner, beat = {}, -1
        if _is_dead(owner):
            return True
        now = self._clock()
        before, since = self._seen.get(name, (None, now))
        if before != beat:
            self._seen[name] = (beat, now)
            return False
        return now - since > self._seconds


class Lease:
    """One lease; a context manager that beats in a thread and deletes the object at the end."""

    def __init__(self, out: Storage, name: str, worker: str, seconds: float) -> None:
        self._out, self._name, self._seconds = out, name, seconds
        self._fields = {"worker": worker, **_identity(), "beat": 0}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def start(self) -> bool:
        """Try to create the object; True when the lease is ours."""
        fault.point("build.before_lease")
        if not self._out.create(self._name, self._dump()):
            return False
        fault.point("build.after_lease")
        self._thread.start()
        return True

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._out.delete(self._name)

    def _dump(self) -> bytes:
        return json.dumps(self._fields).encode()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / 4):
            self._fields["beat"] = int(str(self._fields["beat"])) + 1
            try:
                self._out.put(self._name, self._dump())
            except ArdistError as error:
                # A lost beat costs at most redone work; the next one tries again.
                events.count("build.lease_beat_failed", lease=self._name, reason=error)


def _identity() -> dict[str, str | int]:
    """Which process of which machine we are; empty values where the system does not say."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _start_ticks(os.getpid())}


def _machine() -> str:
    """Boot and process namespace: within one, process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    """When a process began, as the kernel counts; empty when it is gone. Tells a reused number from the old owner."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _is_dead(owner: dict[str, Any]) -> bool:
    machine = _machine()
    if not machine or owner.get("machine") != machine:
        return False
    return _start_ticks(int(owner["pid"])) != owner.get("started")
