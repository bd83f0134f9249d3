"""A supervised job of toy ranks, for the tests of the restart loop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ardist.config.launch import LaunchConfig
from ardist.launch import processes
from ardist.launch.engines import Host, Placement, launches
from ardist.launch.local import free_port
from ardist.launch.nodes import LocalNode
from ardist.launch.supervisor import Supervisor
from ardist.training import goodput

HERE = Path(__file__).parent
PATIENT = {"heartbeat_seconds": 60.0, "step_seconds": 60.0, "data_seconds": 60.0, "other_seconds": 100.0}
"""Limits that nothing reaches on a machine that does much else."""
QUICK = {"heartbeat_seconds": 8.0, "step_seconds": 10.0, "data_seconds": 10.0}
"""Where something stands still for good, which is waited for."""


class Job:
    """A supervised job of two toy ranks in a thread of this process, and what it left."""

    def __init__(
        self, directory: Path, *, steps: int = 12, seconds: float = 0.01, ranks: int = 2, **limits: Any
    ) -> None:
        self.directory = directory
        self.limits = LaunchConfig.model_validate({"restart_pause_seconds": 0.05, **PATIENT, **limits})
        self.nodes: list[LocalNode] = []
        self.words = ["toy_rank", str(directory), str(steps), str(seconds)]
        self.ranks = ranks
        self.supervisor = Supervisor(self.limits, directory, self.start)

    def start(self, attempt: int, job: str) -> list[LocalNode]:
        for path in self.directory.glob("at-*"):
            path.unlink()
        node = LocalNode("localhost", self.limits, module="toy_rank")
        node.watched = self.ranks
        self.nodes.append(node)
        placement = Placement((Host("localhost", self.ranks),), 0, "127.0.0.1", free_port())
        environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
        node.start(launches("plain", placement, self.words, node.scratch), environment)
        return [node]

    def run(self) -> int:
        code = self.supervisor.run()
        assert all(processes.members(node._mark) == [] for node in self.nodes), "nothing is left of the job"
        return code

    def fault(self, rank: int, step: int, what: str) -> None:
        (self.directory / f"fault-{rank}").write_text(f"{step} {what}")

    @property
    def history(self) -> list[int]:
        """Steps in the order in which they were made, redone ones replaced."""
        steps: list[int] = []
        for line in (self.directory / "history").read_text().split():
            steps = [step for step in steps if step < int(line)] + [int(line)]
        return steps

    @property
    def rows(self) -> list[dict[str, Any]]:
        return goodput.restarts(goodput.read(self.directory))

    def stacks(self, rank: int) -> str:
        return (self.directory / "logs" / f"attempt-001-stacks-rank-{rank:05d}.txt").read_text()


def rearm(job: Job, action: Callable[[int], None]) -> None:
    """Do something before every start of the job."""
    start = job.supervisor._start

    def armed(attempt: int, name: str) -> Any:
        action(attempt)
        return start(attempt, name)

    job.supervisor._start = armed


def once_under_way(job: Job, action: Callable[[], None], steps: int = 10) -> None:
    """Do something in the middle of the run, whenever that is."""

    def wait_and_act() -> None:
        wait_for(lambda: (job.directory / "history").exists() and len(job.history) >= steps)
        action()

    threading.Thread(target=wait_and_act, daemon=True).start()


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
