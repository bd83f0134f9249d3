"""The same order in real processes: ranks that are killed at any moment and start again in another number; processes
that are spawned, and such that fork while a loader is open."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from dataset_factory import latent, make_dataset
from spawned import serve_rank, taken

from ardist.config.data import DataConfig
from ardist.data.loader import StreamingLoader, open_loader
from ardist.storage import open_storage

GLOBAL_BATCH, STEPS = 24, 60


def config_of(folder: Path) -> DataConfig:
    return DataConfig(path=str(folder), lanes=12, window=8, prefetch_bytes=2**20)


def last_line(log: Path) -> dict[str, Any] | None:
    """The last whole line; what a killed process left half-written is not committed."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return json.loads(lines[-1]) if lines else None


def rank_main(folder: Path, log: Path, rank: int, world_size: int, store: Path, last: int) -> None:
    """Steps in lock-step: gather everybody's ids, and rank 0 commits them together with the state. After step `last`
    it waits to be killed, however long that takes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
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
        while step == last:
            time.sleep(1)
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
        target = before + rng.randint(4, 14)
        last = target + 2 if target < STEPS else STEPS + 1
        ranks = [
            context.Process(target=rank_main, args=(tmp_path / "data", log, rank, world_size, store, last))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        # Let it make some steps, then kill one rank; the others fail in their next collective or are killed too.
        deadline = time.monotonic() + 120
        while (last_line(log) or {"step": 0})["step"] < min(target, STEPS):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if target < STEPS:
            victim = rng.randrange(world_size)
            os.kill(ranks[victim].pid, signal.SIGKILL)
            kills += 1
            time.sleep(rng.random() * 0.02)
            for process in ranks:
                process.kill()
        for process in ranks:
            process.join(100)
            assert process.exitcode is not None
        sizes.append(world_size)
    got = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert [line["ids"] for line in got] == expected
    assert kills >= 3
    assert set(sizes) == {1, 2, 3, 4}
    assert got[-1]["epoch"] >= 4


def mixed(folder: Path, by: str) -> DataConfig:
    """Clips and images beside each other."""
    make_dataset(folder / "clips", [60, 50, 45])
    shape = (1, 3, 4) if by == "step" else (2, 3, 4)
    make_dataset(folder / "more", [120, 100], shape=shape, make=lambda number, size: latent(1000 + number, size))
    parts = [{"path": str(folder / name), "weight": weight} for name, weight in (("clips", 2), ("more", 1))]
    return DataConfig(mixture=parts, mixture_by=by, lanes=12, window=8, prefetch_bytes=2**20)


@pytest.mark.parametrize("kind", ["one dataset", "by sample", "by step", "remote"])
def test_spawned_processes_deliver_the_exact_batches(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """As many a launcher starts its ranks; what they resume from is what this process has come to."""
    if kind in ("by sample", "by step"):
        config = mixed(tmp_path, kind.removeprefix("by "))
    else:
        make_dataset(tmp_path / "data", [60, 50, 45])
        config = config_of(tmp_path / "data")
    if kind == "remote":
        url = request.getfixturevalue("bucket_url")
        for path in (tmp_path / "data").rglob("*"):
            if path.is_file():
                open_storage(url).put(path.relative_to(tmp_path / "data").as_posix(), path)
        config = config.model_copy(update={"path": url, "cache_dir": str(tmp_path / "cache")})
    with open_loader(config, seed=9, global_batch_size=GLOBAL_BATCH) as loader:
        taken(loader, 3)
        state = loader.state_dict()
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        ranks = [context.Process(target=serve_rank, args=(config, state, 8, rank, 2, queue)) for rank in range(2)]
        for process in ranks:
            process.start()
        answers = sorted(queue.get(timeout=120) for _ in ranks)
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
        expected = taken(loader, 8)
        states = [answer[2] for answer in answers]
        assert states == [loader.state_dict()] * 2
    halves = zip(answers[0][1], answers[1][1], strict=True)
    assert [(a[0], a[1] + b[1], a[2] + b[2]) for a, b in halves] == expected
    for _, _, _, threads, modules in answers:
        assert threads <= 2, "the queue's own thread beside the main one"
        assert modules == [], "a spawned process imports nothing of this test"


FORKING = """
import gc, hashlib, os, signal, sys, threading
from ardist.config.data import DataConfig
from ardist.data.loader import open_loader

config = DataConfig(path=sys.argv[1], lanes=12, window=8, prefetch_bytes=2**20, fetch_threads=3)
loader = open_loader(config, seed=9, global_batch_size=24)
ids = []
for step in range(30):
    ids += next(loader).sample_ids.tolist()
    if step % 10 != 3:
        continue
    stream = loader.streams[0]
    # In the order in which the loader takes them.
    locks = [loader._pipeline._changed, stream._lock, stream._arena._changed, stream._read_ahead._threads._changed]
    taken, release = threading.Event(), threading.Event()

    def hold():
        # As if a reading thread stood inside every lock at the moment of the fork.
        for lock in locks:
            lock.acquire()
        taken.set()
        release.wait()
        for lock in locks:
            lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        if sys.argv[2] == "close":
            loader.close()
            os._exit(0)
        if sys.argv[2] == "forget":
            del loader, stream, locks
            gc.collect()
            os._exit(0)
        sys.exit(0)  # with all that the end of a program does
    release.set()
    holder.join()
    _, status = os.waitpid(child, 0)
    assert status == 0, status
loader.close()
assert threading.active_count() == 1
print(hashlib.sha256(repr(ids).encode()).hexdigest())
"""


@pytest.mark.parametrize("how", ["close", "forget", "end"])
def test_a_fork_while_a_loader_reads_harms_neither_side(tmp_path: Path, how: str) -> None:
    """Children in the middle of reading end at once, each in its own way, and the parent's order goes on."""
    make_dataset(tmp_path, [60, 50, 45, 61, 30, 17])
    with StreamingLoader(config_of(tmp_path), seed=9, global_batch_size=GLOBAL_BATCH) as loader:
        ids = [number for _ in range(30) for number in next(loader).sample_ids.tolist()]
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", FORKING, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(repr(ids).encode()).hexdigest()
    assert "Error" not in done.stderr
