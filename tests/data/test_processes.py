"""The same order in real processes: gloo ranks that are killed at any moment and start again in another number."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from dataset_factory import make_dataset

from ardist.config.data import DataConfig
from ardist.data.loader import StreamingLoader

GLOBAL_BATCH, STEPS = 24, 60


def config_of(folder: Path) -> DataConfig:
    return DataConfig(path=str(folder), lanes=12, window=8, prefetch_bytes=2**20)


def last_line(log: Path) -> dict[str, Any] | None:
    """The last whole line; what a killed process left half-written is not committed."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return json.loads(lines[-1]) if lines else None


def rank_main(folder: Path, log: Path, rank: int, world_size: int, store: Path) -> None:
    """Steps in lock-step: gather everybody's ids, and rank 0 commits them together with the state."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=20)
    )
    loader = StreamingLoader(
        config_of(folder), seed=9, global_batch_size=GLOBAL_BATCH, rank=rank, world_size=world_size
    )
    committed = last_line(log)
    done = 0
    if committed is not None:
        loader.load_state_dict(committed["state"])
        done = committed["step"]
    for step in range(done + 1, STEPS + 1):
        batch = next(loader)
        parts = [torch.empty_like(batch.sample_ids) for _ in range(world_size)]
        torch.distributed.all_gather(parts, batch.sample_ids)
        states: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(states, loader.state_dict())
        assert all(state == states[0] for state in states)
        if rank == 0:
            line = {"step": step, "epoch": batch.epoch, "ids": torch.cat(parts).tolist(), "state": states[0]}
            with log.open("ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")
        time.sleep(0.004)
    loader.close()
    torch.distributed.barrier()
    os._exit(0)


def trim(log: Path) -> None:
    """Drop a half-written last line."""
    if log.exists():
        data = log.read_bytes()
        log.write_bytes(data[: data.rfind(b"\n") + 1])


@pytest.mark.distributed
def test_killed_ranks_continue_the_same_order_in_any_number(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", [60, 50, 45, 61, 30, 17])
    with StreamingLoader(config_of(tmp_path / "data"), seed=9, global_batch_size=GLOBAL_BATCH) as loader:
        expected = [next(loader).sample_ids.tolist() for _ in range(STEPS)]
    context = multiprocessing.get_context("fork")
    log, rng, sizes, kills = tmp_path / "log.jsonl", random.Random(4), [], 0
    for attempt in range(40):
        trim(log)
        world_size = [2, 3, 4, 1][attempt % 4]
        before = (last_line(log) or {"step": 0})["step"]
        if before == STEPS:
            break
        store = tmp_path / f"store-{attempt}"
        ranks = [
            context.Process(target=rank_main, args=(tmp_path / "data", log, rank, world_size, store))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        # Let it make some steps, then kill one rank; the others fail in their next collective or are killed too.
        target, deadline = before + rng.randint(4, 14), time.monotonic() + 30
        while (last_line(log) or {"step": 0})["step"] < min(target, STEPS) and time.monotonic() < deadline:
            time.sleep(0.002)
        if target < STEPS:
            victim = rng.randrange(world_size)
            os.kill(ranks[victim].pid, signal.SIGKILL)
            kills += 1
            time.sleep(rng.random() * 0.02)
            for process in ranks:
                process.kill()
        for process in ranks:
            process.join(30)
            assert process.exitcode is not None
        sizes.append(world_size)
    got = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert [line["ids"] for line in got] == expected
    assert kills >= 3
    assert set(sizes) == {1, 2, 3, 4}
    assert got[-1]["epoch"] >= 4
