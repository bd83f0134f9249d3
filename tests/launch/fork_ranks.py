"""Real ranks for the supervisor without their long imports: forked from a process that has torch and DeepSpeed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ranks as _torch_and_deepspeed_imported_once  # noqa: F401
import yaml
from tiny import settings

from ardist.config import TrainConfig
from ardist.config.launch import LaunchConfig
from ardist.launch.engines import Host, Placement, launches
from ardist.launch.local import hold_port
from ardist.launch.nodes import LocalNode
from ardist.launch.supervisor import Supervisor
from ardist.training import distributed, goodput, trainer
from ardist.training import main as program
from ardist.training.callbacks import Callback
from ardist.training.heartbeat import DIRECTORY_VARIABLE


class Forked:
    """A forked child with the methods of a Popen that the supervisor uses."""

    def __init__(self, action: Callable[[], int]) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = action()
            finally:
                distributed.leave(code)

    def poll(self) -> int | None:
        """The exit code, or minus the signal, once it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end."""
        while self.poll() is None:
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


class ForkNode(LocalNode):
    """The ranks of this machine as forks of this process, which carry no mark in their environment."""

    def fork(
        self,
        placement: Placement,
        words: list[str],
        environment: dict[str, str],
        callbacks: Callable[[], list[Callback]] = list,
    ) -> None:
        """Start all ranks; `callbacks` makes more of them for each."""
        for launch in launches("plain", placement, ["unused"], self.scratch):
            variables = {**environment, **launch.environment, DIRECTORY_VARIABLE: str(self.scratch)}
            forked = Forked(lambda variables=variables: _rank(variables, words, callbacks()))  # type: ignore[misc]
            self._processes.append(forked)  # type: ignore[arg-type]

    def send_signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        super().kill()


def _rank(variables: dict[str, str], words: list[str], callbacks: list[Callback]) -> int:
    os.environ.update(variables)
    built_in = trainer.built_in_callbacks
    trainer.built_in_callbacks = lambda config: [*built_in(config), *callbacks]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    program.prepare_process()
    with open(Path(variables["RANK_LOG"] + variables["RANK"]), "a") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        return program.main(words)


class TrainingJob:
    """A supervised training of tiny ranks; `faults` are the ARDIST_FAULT of its attempts, counted from 1."""

    def __init__(
        self,
        directory: Path,
        data: Path,
        *,
        faults: Sequence[str] | Callable[[int], str] = (),
        ranks: int = 2,
        callbacks: Callable[[], list[Callback]] = list,
        **changes: Any,
    ) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.callbacks = callbacks
        self.faults = faults
        self.ranks = ranks
        # Nothing reaches these limits on a machine that does much else; who waits for one sets it.
        launch = {"restart_pause_seconds": 0.05, "heartbeat_seconds": 60, "step_seconds": 60, "data_seconds": 60}
        values = settings(
            self.run_dir, data, **{"training__steps": 9, "checkpoint__every": 3, "launch": launch, **changes}
        )
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "config.yaml"
        self.path.write_text(yaml.safe_dump(values))
        self.config = TrainConfig.model_validate(values)
        self.gate = directory / "gate"
        """For faults that wait until the test has done something."""
        self.limits: LaunchConfig = self.config.launch
        self.nodes: list[ForkNode] = []
        self.supervisor = Supervisor(self.limits, self.run_dir, self.start)

    def start(self, attempt: int, job: str) -> list[ForkNode]:
        """For the supervisor."""
        node = ForkNode("localhost", self.limits)
        self.nodes.append(node)
        node.holder = hold_port(0)
        placement = Placement((Host("localhost", self.ranks),), 0, "127.0.0.1", node.holder.getsockname()[1])
        if callable(self.faults):
            fault = self.faults(attempt)
        else:
            fault = self.faults[attempt - 1] if attempt <= len(self.faults) else ""
        environment = {"ARDIST_FAULT": fault, goodput.JOB_VARIABLE: f"{job}:{attempt}"}
        environment["RANK_LOG"] = str(self.directory / "stderr-")
        node.fork(placement, [str(self.path)], environment, self.callbacks)
        return [node]

    def run(self) -> int:
        """Until the end."""
        return self.supervisor.run()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The failures that were healed."""
        return goodput.restarts(goodput.read(self.run_dir))

    def stderr(self) -> str:
        """What all ranks said."""
        return "".join(path.read_text() for path in sorted(self.directory.glob("stderr-*")))
