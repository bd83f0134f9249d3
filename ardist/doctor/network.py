"""Ranks that must find each other: on this machine, and on the machines of a hostfile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ardist.config import TrainConfig
from ardist.config.launch import LaunchConfig
from ardist.doctor.clocks import SKEW_SECONDS
from ardist.doctor.findings import Finding, bad, good, weak
from ardist.errors import ArdistError, HardwareError
from ardist.launch.cluster import Cluster, Order
from ardist.launch.engines import Host, Placement, launches
from ardist.launch.hosts import is_here, read_hostfile
from ardist.launch.local import count_gpus, free_port, rank_environment
from ardist.launch.nodes import LocalNode, Node
from ardist.launch.remote import RemoteNode

MODULE = "ardist.doctor.meet"
SECONDS = 120.0


def this_machine() -> Iterator[Finding]:
    """Two processes, or one per GPU, join a process group."""
    ranks = max(2, count_gpus()) if count_gpus() != 1 else 1
    node = LocalNode("localhost", LaunchConfig(), MODULE)
    placement = Placement((Host("localhost", ranks),), 0, "127.0.0.1", free_port())
    node.start(launches("plain", placement, [MODULE], node.scratch), rank_environment(ranks))
    yield _outcome("ranks on this machine", [node], "check NCCL_DEBUG=INFO, /dev/shm, and a firewall on the loopback")


def machines(config: TrainConfig, path: str, overrides: Sequence[str], hostfile: Path, shell: str) -> Iterator[Finding]:
    """Every machine of a hostfile is reached, its clock compared, and all ranks meet."""
    hosts = read_hostfile(hostfile)
    for host in hosts:
        if not is_here(host.name):
            yield from _greeting(host.name, config, path, overrides, shell)
    order = Order(config, path, tuple(overrides), "plain", MODULE)
    subject = f"ranks on {len(hosts)} machines"
    try:
        nodes = Cluster(order, hosts, shell, None, None).start(1, "doctor")
    except ArdistError as error:
        yield bad(subject, str(error), "see above; the hostfile's names must be addresses that all machines can reach")
        return
    advice = "open all TCP ports between the machines; set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    yield _outcome(subject, nodes, advice)


def _greeting(name: str, config: TrainConfig, path: str, overrides: Sequence[str], shell: str) -> Iterator[Finding]:
    try:
        remote = RemoteNode(name, shell, config.launch.node_seconds)
    except HardwareError as error:
        yield bad(name, str(error), "install it, or choose another --remote-shell")
        return
    try:
        answer = remote.greet(path, overrides, {}, seconds=config.launch.node_seconds)
        skew = float(answer["time"]) - time.time()
        yield good(name, f"reached, {answer['gpus']} GPUs")
        if abs(skew) > SKEW_SECONDS:
            advice = "start a time service (chrony); S3 refuses requests with a wrong time"
            yield weak(f"clock of {name}", f"{skew:+.1f} s from ours", advice)
        else:
            yield good(f"clock of {name}", f"{skew:+.1f} s from ours, the way there included")
    except HardwareError as error:
        yield bad(name, str(error), f"try: {shell} {name} true; keys, names and the same folder there are needed")
    finally:
        remote.kill()


def _outcome(subject: str, nodes: Sequence[Node], advice: str) -> Finding:
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            states = [node.state() for node in nodes]
            failure = next((state.failure for state in states if state.failure is not None), None)
            if failure is not None:
                return bad(subject, str(failure), advice)
            if all(state.exit_code is not None for state in states):
                code = max(state.exit_code or 0 for state in states)
                words = next((beat.message for state in states for beat in state.beats if beat.rank == 0), "")
                return bad(subject, f"ended with exit code {code}", advice) if code else good(subject, words)
            time.sleep(0.1)
        return bad(subject, f"the ranks did not meet within {SECONDS:g} s", advice)
    finally:
        for node in nodes:
            node.kill()
