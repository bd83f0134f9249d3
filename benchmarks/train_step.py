"""Our training loop beside a bare DeepSpeed loop at the same ZeRO stage, and beside plain DDP with fused AdamW.

    python benchmarks/train_step.py                                   # tiny preset, 2 gloo ranks on a CPU
    python benchmarks/train_step.py --preset xl --precision bf16 --ranks 8 --stages 0 1

The bare loops get batches from memory, plain random noise and timesteps, and do nothing besides the step: no loader,
no EMA, no log, no checkpoint, no signals. Contenders take turns within each round of steps, so that a change of the
machine's pace meets all of them; the table holds medians over rounds (``bare``: bare DeepSpeed; ``ours/bare``: of the
ratios within a round; ``by cpu``: the same of rank 0's processor time, which leaves out what it waits and hardly
changes on a busy machine; with a GPU it is the host's work). Beside the rates, in rounds of their own, as shares of our
step: what the loop does itself, outside of the model, the optimiser, the averages and the loader (``host``), and the
wait for data.

A second table has what a checkpoint costs the loop at about 50 million parameters (``--save-preset none`` leaves it
out): the time it is blocked, of the first save and the median of later ones, beside a plain copy of the same bytes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from ardist.config import TrainConfig, check
from ardist.data.manifest import VAEIdentity, fold_shards, write_manifest
from ardist.data.sample import SampleInfo, sample_key
from ardist.data.shard_writer import Sample, write_shard
from ardist.diffusion.noise import NoiseSchedule
from ardist.models.denoiser import Denoiser
from ardist.training import distributed

Step = Callable[[], None]


def parse() -> argparse.Namespace:
    """The command line."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--preset", default="tiny")
    words.add_argument("--frames", type=int, default=16)
    words.add_argument("--tokens", type=int, default=32)
    words.add_argument("--batch", type=int, default=8, help="global batch size")
    words.add_argument("--micro-batch", type=int, default=2)
    words.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    words.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    words.add_argument("--guard", default="deepspeed", choices=["deepspeed", "device"])
    words.add_argument("--ranks", type=int, default=2)
    words.add_argument("--rounds", type=int, default=6)
    words.add_argument("--steps", type=int, default=4, help="steps of one contender in one round")
    words.add_argument("--save-preset", default="small", help="denoiser of the second table; none: no such table")
    words.add_argument("--save-width", type=int, default=480, help="its width, a multiple of 8 heads")
    words.add_argument("--save-stages", type=int, nargs="+", default=[1])
    words.add_argument("--saves", type=int, default=6)
    words.add_argument("--json", type=Path, default=None)
    return words.parse_args()


def settings(options: argparse.Namespace, folder: Path, stage: int) -> TrainConfig:
    """Our run at one stage."""
    return check(
        TrainConfig,
        {
            "task": "denoiser",
            "run_dir": str(folder / f"run-{stage}"),
            "denoiser": {"preset": options.preset, "tokens_per_frame": options.tokens},
            "data": {"path": str(folder / "data"), "lanes": options.batch, "window": 64},
            "training": {
                "steps": 10**6,
                "global_batch_size": options.batch,
                "micro_batch_size": options.micro_batch,
                "precision": options.precision,
                "zero_stage": stage,
                "guard": options.guard if stage < 3 else "deepspeed",
                "log_every": 10,
            },
            "checkpoint": {"every": 10**6},
            "tracking": {"wandb": "disabled"},
        },
        "benchmark",
    )


def write_data(options: argparse.Namespace, folder: Path, samples: int = 1024) -> None:
    """Random unit tokens in four shards."""
    generator = np.random.default_rng(0)
    entries = []
    for shard in range(4):
        items = []
        for row in range(samples // 4):
            clip = generator.normal(size=(options.frames, options.tokens, 4))
            clip /= np.linalg.norm(clip, axis=-1, keepdims=True)
            info = SampleInfo(source=f"{shard}-{row}", frames=options.frames)
            items.append(Sample(sample_key(f"{shard}-{row}", (0, options.frames), {}), clip.astype("<f2"), info))
        entries.append(write_shard(folder, shard, items, "float16"))
    vae = VAEIdentity(weights_digest="0" * 64, config_digest="0" * 64)
    header = {"created": "2026-01-01T00:00:00Z", "code_version": "benchmark", "kind": "latents", "vae": vae}
    write_manifest(folder, fold_shards(entries, dataset_id="random", **header))


def our_loop(config: TrainConfig, world: distributed.World) -> tuple[Step, Any]:
    """The trainer as it is, one step at a time."""
    from ardist.training.preflight import check_run
    from ardist.training.run_dir import RunDirectory
    from ardist.training.trainer import Trainer

    run = RunDirectory(config.run_dir)
    if world.is_main:
        run.make()
    world.barrier()
    trainer = Trainer(config, check_run(config, world.size, run.checkpoints), world, run)
    for callback in trainer.callbacks:
        callback.on_start(trainer)
    return trainer.advance, trainer


def batches(options: argparse.Namespace, world: distributed.World) -> list[torch.Tensor]:
    """Micro-batches of one step, in memory on the device."""
    count = options.batch // world.size // options.micro_batch
    shape = (options.micro_batch, options.frames, options.tokens, 4)
    return [torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(world.device) for _ in range(count)]


def bare_loss(model: Any, x0: torch.Tensor, schedule: NoiseSchedule, dtype: torch.dtype) -> torch.Tensor:
    """Noise, forward pass and squared error with plain random numbers."""
    timesteps = torch.randint(0, 1000, x0.shape[:2], device=x0.device).sort(dim=1).values
    noisy = schedule.add_noise(x0, torch.randn_like(x0), timesteps)
    loss: torch.Tensor = (model(noisy.to(dtype), timesteps).float() - x0).square().mean()
    return loss


def bare_deepspeed(options: argparse.Namespace, config: TrainConfig, world: distributed.World) -> Step:
    """DeepSpeed with its own check and clipping, the same optimiser and parameter groups, and nothing around it."""
    import deepspeed

    from ardist.training.engine import DTYPES, deepspeed_settings
    from ardist.training.optimizer import build_optimizer

    plain = config.model_copy(update={"training": config.training.model_copy(update={"guard": "deepspeed"})})
    given = deepspeed_settings(plain, world.size, cuda=world.device.type == "cuda")
    given["gradient_clipping"] = config.optimizer.grad_clip
    assert config.denoiser is not None
    model = Denoiser(config.denoiser).to(world.device)
    optimizer = build_optimizer(model, config.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=given)
    data, dtype = batches(options, world), DTYPES[config.training.precision]
    schedule = NoiseSchedule.create().to(world.device)

    def step() -> None:
        for x0 in data:
            engine.backward(bare_loss(engine, x0, schedule, dtype))
            engine.step()

    return step


def bare_ddp(options: argparse.Namespace, config: TrainConfig, world: distributed.World) -> Step:
    """torch's DDP with fused AdamW and clipping; in bf16 by autocast over fp32 weights."""
    assert config.denoiser is not None
    model = DistributedDataParallel(Denoiser(config.denoiser).to(world.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data, schedule = batches(options, world), NoiseSchedule.create().to(world.device)

    def step() -> None:
        for number, x0 in enumerate(data):
            model.require_backward_grad_sync = number == len(data) - 1
            with torch.autocast(world.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = bare_loss(model, x0, schedule, torch.float32)
            (loss / len(data)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step, count: int, world: distributed.World) -> float:
    """Seconds per step, all ranks started together."""
    world.barrier()
    began = time.perf_counter()
    for _ in range(count):
        step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


class Stopwatch:
    """Seconds spent in calls that are timed by it; a call within another one counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed."""

        @functools.wraps(call)
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - began

        return timed_call


class TimedLoader:
    """A loader whose waits are timed."""

    def __init__(self, loader: Any, watch: Stopwatch) -> None:
        self._next = watch.around(loader.__next__)
        self.loader = loader

    def __next__(self) -> Any:
        return self._next()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def shares(trainer: Any, steps: int, world: distributed.World) -> dict[str, float]:
    """Shares of a step: the wait for data, and the loop itself, which is what remains beside all heavy calls."""
    data, heavy = Stopwatch(), Stopwatch()
    loader, trainer.loader = trainer.loader, TimedLoader(trainer.loader, data)
    engine, objective = trainer.engine, trainer.objective
    patched = [(engine, "backward"), (engine, "step"), (objective, "prepare"), (objective, "loss")]
    patched += [(trainer.ema, "update")] if trainer.ema is not None else []
    for owner, name in patched:
        setattr(owner, name, heavy.around(getattr(owner, name)))
    seconds = steps * timed(trainer.advance, steps, world)
    for owner, name in patched:
        delattr(owner, name)
    trainer.loader = loader
    return {"data_wait": data.seconds / seconds, "host": max(0.0, seconds - data.seconds - heavy.seconds) / seconds}


def measure_stage(options: argparse.Namespace, folder: Path, stage: int, world: distributed.World) -> dict[str, Any]:
    """One row of the first table."""
    config = settings(options, folder, stage)
    ours, trainer = our_loop(config, world)
    contenders = {
        "ours": ours,
        "deepspeed": bare_deepspeed(options, config, world),
        "ddp": bare_ddp(options, config, world),
    }
    for step in contenders.values():
        timed(step, 2, world)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(options.rounds):
        for name in names[turn % 3 :] + names[: turn % 3]:
            began = time.process_time()
            seconds[name].append(timed(contenders[name], options.steps, world))
            processor[name].append(time.process_time() - began)
    row = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    paired, by_processor = (
        [bare / mine for mine, bare in zip(spent["ours"], spent["deepspeed"], strict=True)]
        for spent in (seconds, processor)
    )
    parts = [shares(trainer, options.steps, world) for _ in range(3)]
    trainer.close()
    assert config.denoiser is not None
    result = {
        "stage": stage,
        **row,
        "ours_of_deepspeed": statistics.median(paired),
        "ours_of_deepspeed_by_processor": statistics.median(by_processor),
        **{name: statistics.median(part[name] for part in parts) for name in parts[0]},
        "parameters": sum(p.numel() for p in Denoiser(config.denoiser).parameters()),
    }
    del trainer, contenders, ours
    gc.collect()
    return result


def measure_saves(options: argparse.Namespace, folder: Path, stage: int, world: distributed.World) -> dict[str, Any]:
    """One row of the second table: two steps, then saves in the background one after another."""
    from ardist.training.state import snapshot

    config = settings(options, folder, stage)
    shape = {"preset": options.save_preset, "width": options.save_width, "num_heads": 8}
    shape |= {"tokens_per_frame": options.tokens}
    plain = config.model_dump(exclude={"denoiser"}, mode="json")
    config = check(TrainConfig, {**plain, "denoiser": shape, "run_dir": str(folder / f"saves-{stage}")}, "benchmark")
    step, trainer = our_loop(config, world)
    timed(step, 1, world)
    step_seconds = timed(step, 2, world)
    blocked = []
    for _ in range(options.saves):
        trainer.writer.wait()
        world.barrier()
        began = time.perf_counter()
        trainer.writer.save(snapshot(trainer))
        blocked.append(time.perf_counter() - began)
        trainer.writer.wait()
        trainer.step += 1
    copies = [torch.empty_like(buffer) for buffer in trainer.writer.snapshot_buffers()]
    plain_copy = []
    for _ in range(options.saves):
        world.barrier()
        began = time.perf_counter()
        torch._foreach_copy_(copies, trainer.writer.snapshot_buffers())
        plain_copy.append(time.perf_counter() - began)
    trainer.close()
    assert config.denoiser is not None
    return {
        "stage": stage,
        "parameters": sum(p.numel() for p in Denoiser(config.denoiser).parameters()),
        "step_seconds": step_seconds,
        "first_save_ms": 1000 * blocked[0],
        "save_ms": 1000 * statistics.median(blocked[1:]),
        "copy_ms": 1000 * statistics.median(plain_copy[1:]),
        "mib": sum(copy.numel() * 4 for copy in copies) / 2**20,
    }


def rank_main(options: argparse.Namespace, folder: Path) -> None:
    """One rank: measure every stage; rank 0 prints."""
    world = distributed.start()
    torch.manual_seed(0)
    rows = [measure_stage(options, folder, stage, world) for stage in options.stages]
    stages = [] if options.save_preset == "none" else options.save_stages
    saves = [measure_saves(options, folder, stage, world) for stage in stages]
    if not world.is_main:
        return
    table = Table(
        title=f"steps/s: {options.preset}, {rows[0]['parameters'] / 1e6:.1f} M parameters, {options.precision}, "
        f"{world.size} ranks on {world.device.type}, batch {options.batch} x {options.frames} x {options.tokens}"
    )
    heads = ("ZeRO", "ours", "bare", "DDP", "ours / bare", "by cpu", "ours / DDP", "host", "data wait")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            str(row["stage"]),
            *(f"{row[name]:.2f}" for name in ("ours", "deepspeed", "ddp")),
            f"{row['ours_of_deepspeed']:.2f}",
            f"{row['ours_of_deepspeed_by_processor']:.2f}",
            f"{row['ours'] / row['ddp']:.2f}",
            f"{row['host']:.1%}",
            f"{row['data_wait']:.1%}",
        )
    Console().print(table)
    if saves:
        Console().print(saves_table(saves, world))
    if options.json is not None:
        shown = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"options": shown, "rows": rows, "saves": saves}, indent=1))


def saves_table(saves: list[dict[str, Any]], world: distributed.World) -> Table:
    """What a checkpoint costs the loop."""
    table = Table(title=f"a checkpoint in the background, {saves[0]['parameters'] / 1e6:.1f} M parameters, each rank")
    heads = ("ZeRO", "MiB", "blocked, first", "blocked, later", "plain copy", "step", "share of 1000 steps")
    for head in heads:
        table.add_column(head, justify="right")
    for row in saves:
        table.add_row(
            str(row["stage"]),
            f"{row['mib']:.0f}",
            *(f"{row[name]:.0f} ms" for name in ("first_save_ms", "save_ms", "copy_ms")),
            f"{1000 * row['step_seconds']:.0f} ms",
            f"{row['save_ms'] / 1e6 / row['step_seconds']:.4%}",
        )
    return table


def main() -> int:
    """Start the ranks, or be one."""
    options = parse()
    if "RANK" in os.environ:
        rank_main(options, Path(os.environ["ARDIST_BENCHMARK"]))
        distributed.leave(0)
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        write_data(options, folder / "data")
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.ranks)}
        ranks = []
        for rank in range(options.ranks):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "ARDIST_BENCHMARK": name}
            ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
        return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
