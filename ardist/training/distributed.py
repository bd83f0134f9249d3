"""The ranks of a run: who am I, start and end of the process group, small agreements between ranks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ardist.errors import ConfigError, HardwareError, Preempted

_log = logging.getLogger("ardist.training")


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run; `control` is a gloo group that never touches the accelerator."""

    rank: int
    size: int
    device: torch.device
    control: Any = None
    timeout: timedelta | None = None
    """How long a collective waits for the other ranks."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def all_gather(self, value: Any, group: Any = None) -> list[Any]:
        """Every rank's `value` in rank order, over the control group or another gloo group.

        Values travel as JSON (tuples arrive as lists): nothing is ever unpickled.
        """
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        group = group or self.control
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        rows = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=group)
        texts = [bytes(row[: int(size)].tolist()) for row, size in zip(rows, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def broadcast(self, value: Any, group: Any = None) -> Any:
        """Rank 0's `value` (as JSON) on every rank."""
        return self.all_gather(value if self.is_main else None, group)[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a tensor on this rank's device, in float64 so that its order cannot matter much."""
        total = values.double()
        if self.size > 1:
            dist.all_reduce(total)
        return total / self.size


def environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's variables; (0, 1, 0) without a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [os.environ.get(name) for name in names]
    if texts[0] is None or texts[1] is None:
        return 0, 1, 0
    try:
        rank, size, local = (int(text or "0") for text in texts)
    except ValueError:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers, not {texts}") from None
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={size}")
    return rank, size, local


def uses_gpu() -> bool:
    """True when training runs on GPUs: there is one, and ``DS_ACCELERATOR=cpu`` does not say otherwise."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def prepare_environment() -> None:
    """Choose DeepSpeed's accelerator and log level; to be called before DeepSpeed is imported."""
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


def start(timeout_minutes: float = 30.0) -> World:
    """Start the process group (NCCL with a GPU, gloo without) and a separate gloo group for agreements."""
    prepare_environment()
    rank, size, local = environment()
    cuda = uses_gpu()
    if cuda:
        if local >= torch.cuda.device_count():
            raise HardwareError(f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    timeout = timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        if size == 1:
            # A store of its own: a single process needs no port, so that many can run beside each other.
            dist.init_process_group(
                backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise HardwareError(f"rank {rank} of {size} could not join the process group: {error}") from error
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local)):
        os.environ.setdefault(name, str(value))
    control = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    return World(rank, size, device, control, timeout)


def stop() -> None:
    """End the process group if there is one, so that the same process can start another."""
    if not dist.is_initialized():
        return
    if "deepspeed" in sys.modules:
        import deepspeed.comm

        if deepspeed.comm.is_initialized():
            # It keeps groups of its own, which a later engine would take for living ones.
            deepspeed.comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this rank's process at once, after the streams and (when all went well) the process group are closed.

    ZeRO-3 over gloo now and then aborts in a destructor at interpreter exit after all work is done, which would turn
    a good exit code into a crash; so a rank does not run the interpreter's exit.
    """
    if code in (0, Preempted.exit_code):
        stop()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone, or it is closed
            stream.flush()
    os._exit(code)
