"""Which machines take part: hostfiles, which of them is this one, and what is left when some are lost."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from ardist.errors import ConfigError
from ardist.launch.engines import Host

_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.:%-]+)\s+slots\s*=\s*(?P<slots>\d+)$")


def read_hostfile(path: str | Path, num_nodes: int | None = None) -> tuple[Host, ...]:
    """The machines of a hostfile, one ``name slots=8`` per line, or its first `num_nodes`.

    Raises `ConfigError` with every bad line: unknown form, no slots, a machine named twice.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the hostfile {str(path)!r}: {error}") from None
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _LINE.match(words)
        if match is None:
            problems.append(f"line {number}: {words!r} is not of the form 'name slots=8'")
        elif int(match["slots"]) < 1:
            problems.append(f"line {number}: {match['name']} has slots={match['slots']}; legal: 1 and more")
        elif match["name"].startswith("-"):
            problems.append(f"line {number}: {match['name']!r} begins with a dash")
        elif match["name"] in [host.name for host in hosts]:
            problems.append(f"line {number}: {match['name']} is named twice")
        else:
            hosts.append(Host(match["name"], int(match["slots"])))
    if not problems and not hosts:
        problems.append("it names no machine")
    if not problems and num_nodes is not None and not 1 <= num_nodes <= len(hosts):
        problems.append(f"--num-nodes {num_nodes} of {len(hosts)} machines; legal: 1 to {len(hosts)}")
    if problems:
        raise ConfigError(f"the hostfile {str(path)!r} cannot be used:\n" + "\n".join(f"  {line}" for line in problems))
    return tuple(hosts[:num_nodes])


def is_here(name: str) -> bool:
    """True when a name or address is this machine's."""
    if name in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    own = {address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}
    if name in own:
        return True
    try:
        ipaddress.ip_address(name)
        return False
    except ValueError:
        pass
    try:
        return bool({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)} & own)
    except OSError:
        return False  # whoever cannot be found is not here; the connection will say the rest


def interface_of(name: str) -> str | None:
    """The network interface that has this address, for the sockets of collectives; None for no address of ours."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == name for address in addresses):
            return str(interface)
    return None


def fitting(hosts: Sequence[Host], global_batch_size: int) -> tuple[Host, ...]:
    """As many ranks of `hosts` as divide the global batch, taken away from the last machines first."""
    total = sum(host.slots for host in hosts)
    size = next(ranks for ranks in range(total, 0, -1) if global_batch_size % ranks == 0)
    chosen = []
    for host in hosts:
        slots = min(host.slots, size)
        if slots:
            chosen.append(Host(host.name, slots))
            size -= slots
    return tuple(chosen)
