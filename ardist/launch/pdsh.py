"""Machines reached by pdsh: DeepSpeed's own launcher starts the ranks of all of them from here.

pdsh hands no input on, so nothing can be said to another machine once its ranks run: only those of this machine are
watched and asked to save, which is enough to notice that all stand still. Over there the end of the connection kills.
DeepSpeed joins words to a line for a shell; what the user wrote travels through it as one word of letters and digits.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ardist.errors import ConfigError, HardwareError
from ardist.events import events
from ardist.launch import processes
from ardist.launch.cluster import FORWARDED, Cluster, Order
from ardist.launch.engines import Host, Launch, Placement, one_for_all
from ardist.launch.hosts import is_here
from ardist.launch.local import rank_environment
from ardist.launch.nodes import LocalNode, Node, rank_processes
from ardist.launch.remote import SSH_OPTIONS, RemoteNode
from ardist.launch.wire import encode
from ardist.process_identity import machine_id
from ardist.training.goodput import JOB_VARIABLE

RELAY = "ardist.launch.relay"
GREETING_SECONDS = 10.0
"""Least time that machines have to answer."""
_PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
_HOT = re.compile(r"[\"$`\\\n]")
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")


class PdshCluster(Cluster):
    """The machines of a hostfile, of which this must be one; they are asked, then started, through pdsh."""

    def __init__(self, order: Order, hosts: Sequence[Host], master_addr: str | None, master_port: int | None) -> None:
        super().__init__(order, hosts, "pdsh", master_addr, master_port)
        if order.engine != "deepspeed":
            raise ConfigError(
                f"--remote-shell pdsh is DeepSpeed's; legal with it: --launcher deepspeed, not {order.engine}"
            )
        if not any(is_here(host.name) for host in hosts):
            raise ConfigError(
                "with --remote-shell pdsh this machine must be in the hostfile: only its ranks are watched"
            )
        for what, path in (("folder", os.getcwd()), ("interpreter", sys.executable)):
            if not _PLAIN.fullmatch(path):
                raise ConfigError(
                    f"the {what} {path!r} has characters that DeepSpeed does not hand through pdsh intact"
                )
        if shutil.which("pdsh") is None:
            raise HardwareError("pdsh, which is to reach the machines, is not on this machine")

    def _greet_all(
        self, attempt: int
    ) -> tuple[dict[str, RemoteNode], dict[str, dict[str, Any]], list[tuple[str, str]]]:
        """Every machine tells what it is and leaves; this one too, for it is reached the same way."""
        message = {
            "config": self._order.path,
            "overrides": list(self._order.overrides),
            "environment": handed_on(),
            "port": self._master[1] if attempt == 1 else None,
        }
        script = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -m ardist.launch.agent "
        names = [host.name for host in self._hosts]
        words = ["pdsh", "-S", "-R", "ssh", "-f", str(len(names)), "-w", ",".join(names), script + encode(message)]
        seconds = max(self._order.config.launch.node_seconds, GREETING_SECONDS)
        output, complaints = _ask(words, seconds)
        answers = {name: answer for name in names if (answer := _answer(name, output)) is not None}
        for name in names[1:]:  # the ranks meet on the first one
            answers.get(name, {}).pop("busy", None)
        problems = []
        for name in [name for name in names if name not in answers]:
            told = [line for line in complaints.decode(errors="replace").splitlines() if f"{name}: " in line]
            why = told[0].partition(f"{name}: ")[2] if told else f"no answer within {seconds:g} s"
            problems.append((name, f"machine {name} cannot be reached by pdsh, or ardist does not start there: {why}"))
        return {}, answers, problems

    def _start_on(
        self,
        hosts: tuple[Host, ...],
        remotes: dict[str, RemoteNode],
        answers: dict[str, dict[str, Any]],
        attempt: int,
        job: str,
    ) -> list[Node]:
        if len(hosts) == 1 and is_here(hosts[0].name):
            return super()._start_on(hosts, remotes, answers, attempt, job)
        address, port = self._meeting_point(hosts, answers)
        place = Placement(hosts, 0, address, port)
        node = PdshNode("pdsh", self._order.config.launch, self._order.module)
        node.ranks = place.world_size
        node.watched = sum(host.slots for host in hosts if is_here(host.name))
        message = {
            "program": self._order.program,
            "hosts": [host.name for host in hosts],
            "environment": handed_on() | {JOB_VARIABLE: f"{job}:{attempt}"},
            "mark": node.variables[processes.VARIABLE],
            "machine": machine_id(),
            "watched": node.variables,
        }
        words = one_for_all(place, [RELAY, encode(message)], node.scratch, debug=self._order.debug)
        # DeepSpeed writes some of its environment into the line for the shell, in double quotes at best.
        ours = rank_environment(hosts[0].slots) | connection_environment()
        environment = {
            name: value for name, value in ours.items() if name.startswith("PDSH_") or not _HOT.search(value)
        }
        node.start([Launch(words, {})], environment)
        return [node]


class PdshNode(LocalNode):
    """DeepSpeed's launcher with pdsh, and the ranks that it started on this machine."""

    def send_signal(self, number: int) -> None:
        """To the ranks of this machine, which tell the others. The launcher must not get one: on SIGTERM it kills
        every DeepSpeed job on the machines of its hostfile."""
        ranks = rank_processes(self._mark, self._module)
        processes.send(ranks, number)
        if not ranks:
            processes.kill(self._mark)


def connection_environment() -> dict[str, str]:
    """Options for pdsh's connections where the user chose none: to fail in time, and to ask for no password."""
    if "PDSH_SSH_ARGS" in os.environ or "PDSH_SSH_ARGS_APPEND" in os.environ:
        return {}
    return {"PDSH_SSH_ARGS_APPEND": " ".join(SSH_OPTIONS)}


def _ask(words: Sequence[str], seconds: float) -> tuple[bytes, bytes]:
    """What a program and what it started said until its end, or until they were killed after `seconds`."""
    mark = secrets.token_hex(8)
    # Marked, for pdsh gives every connection a session of its own.
    environment = os.environ | connection_environment() | {processes.VARIABLE: mark}
    pipe = subprocess.PIPE
    asked = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment)
    try:
        return asked.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        events.count("launch.pdsh_late", seconds=seconds)
        processes.kill(mark)
        return asked.communicate()


def handed_on() -> dict[str, str]:
    """The variables for the ranks of other machines. They can be read in the list of processes, so that nothing that
    looks like a secret is among them."""
    named = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    return {name: value for name, value in named.items() if not _SECRET.search(name.upper())}


def _answer(name: str, output: bytes) -> dict[str, Any] | None:
    for line in output.decode(errors="replace").split("\n"):
        if line.startswith(f"{name}: {{"):
            try:
                answer = json.loads(line.partition(": ")[2])
            except ValueError:
                continue  # a login shell's greeting
            if isinstance(answer, dict) and "hello" in answer:
                return answer
    return None
