"""Command lines that start the ranks of one machine: the deepspeed launcher, torchrun, or nobody in between."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENGINES = ("deepspeed", "torchrun", "plain")
MODULE = "ardist.training.main"


@dataclass(frozen=True)
class Host:
    """One machine of a job and how many ranks it takes."""

    name: str
    slots: int


@dataclass(frozen=True)
class Placement:
    """Which ranks one machine runs: machine number `node` of `hosts`, with the first one as meeting point."""

    hosts: tuple[Host, ...]
    node: int
    master_addr: str
    master_port: int

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return sum(host.slots for host in self.hosts)

    @property
    def local_size(self) -> int:
        """Ranks of this machine."""
        return self.hosts[self.node].slots

    @property
    def ranks(self) -> range:
        """The ranks of this machine; they follow each other in the order of the hosts."""
        first = sum(host.slots for host in self.hosts[: self.node])
        return range(first, first + self.local_size)


@dataclass(frozen=True)
class Launch:
    """One process to start, with what it needs in its environment beyond our own."""

    words: list[str]
    environment: dict[str, str]


def launches(
    engine: str, placement: Placement, program: Sequence[str], scratch: Path, *, debug: bool = False
) -> list[Launch]:
    """What to start on this machine for `program`, the words after ``python -m``; `scratch` may take a file."""
    if engine == "plain":
        return [_rank(placement, rank, program) for rank in placement.ranks]
    if engine == "torchrun":
        return [Launch(_torchrun(placement, program), {})]
    return [Launch(_deepspeed(placement, program, scratch, debug), {})]


def _rank(placement: Placement, rank: int, program: Sequence[str]) -> Launch:
    environment = {
        "RANK": rank,
        "WORLD_SIZE": placement.world_size,
        "LOCAL_RANK": rank - placement.ranks.start,
        "LOCAL_WORLD_SIZE": placement.local_size,
        "LOCAL_SIZE": placement.local_size,
        "CROSS_RANK": placement.node,
        "CROSS_SIZE": len(placement.hosts),
        "MASTER_ADDR": placement.master_addr,
        "MASTER_PORT": placement.master_port,
    }
    return Launch([sys.executable, "-u", "-m", *program], {name: str(value) for name, value in environment.items()})


def _torchrun(placement: Placement, program: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run"]
    words += ["--nnodes", str(len(placement.hosts)), "--node-rank", str(placement.node)]
    words += ["--nproc-per-node", str(placement.local_size), "--max-restarts", "0"]
    words += ["--master-addr", placement.master_addr, "--master-port", str(placement.master_port)]
    if len(placement.hosts) > 1 and _is_address(placement.hosts[placement.node].name):
        # Machines may share a host name; addresses they do not share.
        words += ["--local-addr", placement.hosts[placement.node].name]
    return [*words, "--module", *program]


def _deepspeed(placement: Placement, program: Sequence[str], scratch: Path, debug: bool) -> list[str]:
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "info" if debug else "error"]
    if len(placement.hosts) == 1:
        # No hostfile: an empty one keeps the launcher from reading the machine's own.
        words += ["--hostfile", str(scratch / "no-hostfile"), "--num_gpus", str(placement.local_size)]
    else:
        words += ["--hostfile", _hostfile(placement, scratch), "--no_ssh", "--node_rank", str(placement.node)]
    words += ["--master_addr", placement.master_addr, "--master_port", str(placement.master_port)]
    return [*words, "--module", *program]


def one_for_all(placement: Placement, program: Sequence[str], scratch: Path, *, debug: bool = False) -> list[str]:
    """DeepSpeed's launcher, which starts the ranks of all machines by pdsh; no word of `program` may mean anything to
    a shell."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "info" if debug else "error"]
    words += ["--launcher", "pdsh", "--force_multi", "--no_ssh_check", "--hostfile", _hostfile(placement, scratch)]
    words += ["--master_addr", placement.master_addr, "--master_port", str(placement.master_port)]
    return [*words, "--module", *program]


def _hostfile(placement: Placement, scratch: Path) -> str:
    path = scratch / "hostfile"
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in placement.hosts), encoding="utf-8")
    return str(path)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
