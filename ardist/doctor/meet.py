"""A rank that only meets the others: ``python -m ardist.doctor.meet``; joins the process group and adds numbers up."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from ardist.training import distributed
from ardist.training.heartbeat import heartbeat

MINUTES = 0.5
ELEMENTS = 2**22


def main() -> int:
    """Returns 0 when the sum over ranks is right."""
    heartbeat.start_from_environment()
    try:
        world = distributed.start(MINUTES)
        heartbeat.resumed(0)
        values = torch.full((ELEMENTS,), float(world.rank + 1), device=world.device)
        dist.all_reduce(values)
        if float(values[0]) != world.size * (world.size + 1) / 2:
            raise RuntimeError(f"an all-reduce over {world.size} ranks gave {float(values[0])}")
        began = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1].cpu())  # waits for the device
        seconds = time.perf_counter() - began
        assert total > 0
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        heartbeat.end(4, f"{type(error).__name__}: {error}")
        return 4
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    heartbeat.end(0, f"{backend} over {world.size} ranks, {ELEMENTS * 4 / 2**20 / seconds:.0f} MiB/s in an all-reduce")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
