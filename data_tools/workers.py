"""Several processes on one machine, each a leasing worker of the same plan."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ardist import fault, log
from ardist.errors import ArdistError, ConfigError, DataError, HardwareError
from ardist.events import events
from ardist.storage import Storage, open_storage
from data_tools.encode import EncoderChoice
from data_tools.finalize import missing_commits
from data_tools.lease import Pace
from data_tools.plan import Plan, load_plan
from data_tools.progress import Progress
from data_tools.sandbox import die_with_parent
from data_tools.shard import Counts, ShardSettings
from data_tools.staging import staging_folder
from data_tools.worker import ShardProgress, run_worker

_log = logging.getLogger("data_tools.workers")

RESTARTS_PER_WORKER = 3


@dataclass(frozen=True)
class Task:
    """What a worker process needs to know."""

    out: str
    encoder: EncoderChoice
    settings: ShardSettings
    pace: Pace


class _Relay:
    """Progress that is sent to the coordinator."""

    def __init__(self, connection: Connection) -> None:
        self._send = connection.send

    def advanced(self, shard: int, counts: Counts) -> None:
        self._send(("advanced", shard, counts))

    def committed(self, shard: int, counts: Counts) -> None:
        self._send(("committed", shard, counts))


def serve(task: Task, number: int, progress: ShardProgress, label: str = "") -> None:
    """Be worker `number` of a task until all shards are committed; raises what goes wrong."""
    storage = open_storage(task.out)
    plan = load_plan(storage)
    if plan is None:
        raise DataError(f"{storage.url} has no plan")
    encoder = task.encoder.for_worker(number).make()
    fault.point("build.worker_started")
    with staging_folder(storage) as staging:
        run_worker(plan, storage, encoder, task.settings, task.pace, staging, progress, label)


def _work(task: Task, number: int, connection: Connection, parent: int) -> None:
    """The life of a worker process."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what an interrupt means
    log.configure()
    events.clear()
    status = 0
    try:
        serve(task, number, _Relay(connection))
    except ArdistError as error:
        connection.send(("failed", error.exit_code, str(error)))
        status = error.exit_code
    except Exception as error:  # noqa: BLE001 - a process that ends is replaced; here it says why
        _log.error("worker %d: unexpected %s: %s", number, type(error).__name__, error)
        _log.debug("worker %d", number, exc_info=True)
        status = 1
    connection.send(("events", 0, events.snapshot()))
    connection.close()
    sys.exit(status)


class WorkerPool:
    """Starts worker processes, passes their progress on, replaces those that die."""

    def __init__(self, task: Task, count: int, progress: Progress, method: str = "spawn") -> None:
        self._task, self._count, self._progress = task, count, progress
        self._context: Any = multiprocessing.get_context(method)
        self._running: dict[Connection, tuple[int, BaseProcess]] = {}
        self._restarts = 0

    def run(self, storage: Storage, plan: Plan) -> None:
        """Return when all shards are committed; raises what a worker raised, `HardwareError` when they keep dying."""
        try:
            for number in range(min(self._count, len(missing_commits(storage, plan)))):
                self._start(number)
            while self._running:
                for connection in wait(list(self._running)):
                    assert isinstance(connection, Connection)
                    self._hear(connection)
        finally:
            for _, process in self._running.values():
                process.kill()
                process.join()
            self._running.clear()

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work, args=(self._task, number, theirs, os.getpid()), name=f"worker-{number}", daemon=True
        )
        process.start()
        theirs.close()
        self._running[ours] = (number, process)

    def _hear(self, connection: Connection) -> None:
        """One message, or the end of a worker."""
        try:
            kind, number, content = connection.recv()
        except (EOFError, OSError):
            self._ended(connection)
            return
        if kind == "failed":
            raise error_of(number, content)
        if kind == "events":
            for name, count in content.items():
                events.count(name, count, level=10, worker="all")
            return
        handlers: dict[str, Callable[[int, Counts], None]] = {
            "advanced": self._progress.advanced,
            "committed": self._progress.committed,
        }
        handlers[kind](number, content)

    def _ended(self, connection: Connection) -> None:
        number, process = self._running.pop(connection)
        connection.close()
        process.join()
        if process.exitcode == 0:
            return
        events.count("build.worker_died", worker=number, status=process.exitcode)
        self._restarts += 1
        if self._restarts > RESTARTS_PER_WORKER * self._count:
            raise HardwareError(
                f"workers died {self._restarts} times, the last with status {process.exitcode}; "
                "is there enough memory? what is committed stays, run build again"
            )
        self._start(number)


def error_of(exit_code: int, message: str) -> ArdistError:
    """The error that a worker reported, as one of ours."""
    kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, HardwareError)}
    return kinds.get(exit_code, ArdistError)(message)
