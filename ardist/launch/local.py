"""What this machine has: GPUs, free ports, and the environment its ranks need."""

from __future__ import annotations

import functools
import os
import socket

from ardist.errors import HardwareError
from ardist.launch.hosts import interface_of


@functools.cache
def count_gpus() -> int:
    """GPUs that training would use: none when ``DS_ACCELERATOR=cpu`` says so."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    # Only now: it takes seconds.
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def rank_environment(ranks: int, address: str | None = None) -> dict[str, str]:
    """The environment of a rank's process; `address` of this machine chooses the interface of the collectives."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not count_gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    interface = None if address is None else interface_of(address)
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    return environment


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with hold_port(0) as holder:
        return int(holder.getsockname()[1])


def check_port(port: int) -> None:
    """Raise `HardwareError` when somebody listens on a port of this machine."""
    hold_port(port).close()


def hold_port(port: int) -> socket.socket:
    """Bind a port, so that nobody is given it as a free one while the ranks start, who may listen there meanwhile.

    Raises `HardwareError` when somebody listens on it.
    """
    holder = socket.socket()
    # With it the ranks' store, which sets it too, can bind the port as well; who asks for any port never gets this one.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind(("", port))
    except OSError as error:
        holder.close()
        raise HardwareError(
            f"port {port} of this machine cannot be used: {error.strerror}; choose another with --master-port, or "
            "leave it out"
        ) from None
    return holder
