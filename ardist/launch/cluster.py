"""All machines of an attempt: who answers, do they agree, who runs which ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardist.code_digest import code_digest
from ardist.config import TrainConfig
from ardist.errors import ArdistError, ConfigError, HardwareError
from ardist.events import events
from ardist.launch.engines import MODULE, Host, Placement, launches
from ardist.launch.hosts import fitting, is_here
from ardist.launch.local import count_gpus, free_port, hold_port, rank_environment
from ardist.launch.nodes import LocalNode, Node
from ardist.launch.remote import RemoteNode
from ardist.launch.together import together
from ardist.launch.wire import pack_placement
from ardist.training.goodput import JOB_VARIABLE

_log = logging.getLogger("ardist.launch")

FORWARDED = ("ARDIST_", "AWS_", "DS_", "GLOO_", "NCCL_", "OMP_", "PYTHON", "PYTORCH_", "TORCH", "WANDB_")
"""Beginnings of the names of variables that the ranks of other machines get too."""


@dataclass(frozen=True)
class Order:
    """What is to be run, on every machine alike."""

    config: TrainConfig
    path: str
    overrides: tuple[str, ...]
    engine: str = "deepspeed"
    module: str = MODULE
    debug: bool = False

    @property
    def program(self) -> list[str]:
        """The words after ``python -m``."""
        return [self.module, self.path, *self.overrides, *(["--debug"] if self.debug else [])]


def start_here(order: Order, placement: Placement, job: str, attempt: int, *, address: str | None = None) -> LocalNode:
    """Start this machine's ranks."""
    holder = hold_port(placement.master_port) if placement.node == 0 else None
    node = LocalNode(placement.hosts[placement.node].name, order.config.launch, order.module)
    node.holder = holder
    node.ranks = node.watched = placement.local_size
    environment = rank_environment(placement.local_size, address) | {JOB_VARIABLE: f"{job}:{attempt}"}
    node.start(launches(order.engine, placement, order.program, node.scratch, debug=order.debug), environment)
    return node


class Cluster:
    """The machines of a hostfile; this one may be among them."""

    def __init__(
        self, order: Order, hosts: Sequence[Host], shell: str, master_addr: str | None, master_port: int | None
    ) -> None:
        self._order = order
        self._hosts = tuple(hosts)
        self._shell = shell
        self._master = (master_addr, master_port)

    def start(self, attempt: int, job: str) -> list[Node]:
        """Start all ranks. At first every machine must be there; later those that are left, `launch.min_nodes` or more.

        Raises `HardwareError` for machines that cannot be reached, do not have what the hostfile says, or are too few,
        and `ConfigError` for machines with another code or configuration.
        """
        remotes, answers, problems = self._greet_all(attempt)
        try:
            unfit = {name for name, _ in problems} | {name for name in answers if answers[name].get("busy")}
            problems += self._disagreements(answers)
            lost = {name for name, _ in problems}
            if problems and attempt == 1:
                text = "\n".join(f"  {problem}" for _, problem in problems)
                error = HardwareError if unfit else ConfigError
                raise error(f"the job cannot start on these machines:\n{text}")
            for name, problem in problems:
                events.count("launch.machine_lost", host=name, reason=problem)
            left = [host for host in self._hosts if host.name not in lost]
            least = self._order.config.launch.min_nodes
            if len(left) < least:
                raise HardwareError(f"{len(left)} of {len(self._hosts)} machines are left; launch.min_nodes={least}")
            hosts = fitting(left, self._order.config.training.global_batch_size)
            if hosts != self._hosts:
                shown = ", ".join(f"{host.name} slots={host.slots}" for host in hosts)
                _log.warning("this attempt runs on %d of %d machines: %s", len(hosts), len(self._hosts), shown)
            nodes = self._start_on(hosts, remotes, answers, attempt, job)
        except (ArdistError, OSError):
            together(lambda remote: remote.kill(), remotes.values())
            raise
        spare = {name: remote for name, remote in remotes.items() if remote not in nodes}
        for name in spare:
            _log.info("%s is not needed", name)
        together(lambda remote: remote.kill(), spare.values())
        return nodes

    def _greet_all(
        self, attempt: int
    ) -> tuple[dict[str, RemoteNode], dict[str, dict[str, Any]], list[tuple[str, str]]]:
        seconds = self._order.config.launch.node_seconds
        answers: dict[str, dict[str, Any]] = {}
        problems: list[tuple[str, str]] = []
        remotes: dict[str, RemoteNode] = {}
        for name in [host.name for host in self._hosts if not is_here(host.name)]:
            try:
                remotes[name] = RemoteNode(name, self._shell, seconds)
            except OSError as error:
                problems.append((name, f"machine {name} cannot be reached: {error}"))
        environment = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}

        def greet(name: str) -> None:
            try:
                answers[name] = remotes[name].greet(
                    self._order.path,
                    self._order.overrides,
                    environment,
                    port=self._port_of(name) if attempt == 1 else None,
                    seconds=max(seconds, 10.0),
                )
            except HardwareError as error:
                problems.append((name, str(error)))

        together(greet, remotes)
        return remotes, answers, problems

    def _port_of(self, name: str) -> int | None:
        """The port that the user chose on the first machine of the file; None on any other."""
        return self._master[1] if name == self._hosts[0].name else None

    def _disagreements(self, answers: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
        """What keeps a machine that answers from taking part."""
        problems = []
        mine = {"code": code_digest(), "config": self._order.config.digest()}
        for name, answer in answers.items():
            if answer["problem"] is not None:
                problems.append((name, f"{name}: {answer['problem']}"))
                continue
            if answer.get("busy") is not None:
                problems.append((name, f"{name}: {answer['busy']}"))
            for kind, digest in mine.items():
                if answer[kind] != digest:
                    problems.append(
                        (name, f"{name} has another {kind}: {answer[kind][:12]}… instead of {digest[:12]}…")
                    )
        for host in self._hosts:
            gpus = answers[host.name]["gpus"] if host.name in answers else count_gpus() if is_here(host.name) else 0
            if gpus and host.slots > gpus:
                problems.append((host.name, f"{host.name} has {gpus} GPUs, the hostfile gives it slots={host.slots}"))
        return problems

    def _start_on(
        self,
        hosts: tuple[Host, ...],
        remotes: dict[str, RemoteNode],
        answers: dict[str, dict[str, Any]],
        attempt: int,
        job: str,
    ) -> list[Node]:
        address, port = self._meeting_point(hosts, answers)
        order, nodes = self._order, list[Node]()
        for index, host in enumerate(hosts):
            placement = Placement(hosts, index, address, port)
            remote = remotes.get(host.name)
            if remote is None:
                try:
                    nodes.append(start_here(order, placement, job, attempt, address=host.name))
                except (ArdistError, OSError):
                    together(lambda node: node.kill(), nodes)
                    raise
                continue
            remote.start(
                placement=pack_placement(placement),
                program=order.program,
                engine=order.engine,
                debug=order.debug,
                environment={JOB_VARIABLE: f"{job}:{attempt}"},
            )
            nodes.append(remote)
        return nodes

    def _meeting_point(self, hosts: tuple[Host, ...], answers: dict[str, dict[str, Any]]) -> tuple[str, int]:
        """Address and port on the first machine where the ranks find each other."""
        first = hosts[0].name
        address, port = self._master
        if port is None:
            port = int(answers[first]["free_port"]) if first in answers else free_port()
        # What the user named is on the first machine of the file; without that machine it is void.
        if address is None or first != self._hosts[0].name:
            address = "127.0.0.1" if len(hosts) == 1 else first
        return address, port


def start_alone(order: Order, placement: Placement) -> Callable[[int, str], list[Node]]:
    """A starter for one machine of a job that is started on every machine by somebody else, or the only one."""

    def start(attempt: int, job: str) -> list[Node]:
        one = len(placement.hosts) == 1
        port = placement.master_port or free_port()
        place = Placement(placement.hosts, placement.node, placement.master_addr, port)
        node = start_here(order, place, job, attempt, address=None if one else placement.hosts[placement.node].name)
        node.ranks = place.world_size  # the others' launchers do not write into the book
        return [node]

    return start


def run_directory(config: TrainConfig) -> Path:
    """Where the job keeps its book."""
    return Path(config.run_dir).expanduser().absolute()
