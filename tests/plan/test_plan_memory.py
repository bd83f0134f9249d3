"""What `ardist plan --device cpu` says of memory against the measured peak: `small` on two gloo ranks, in fp32 and in
bf16 with sums in fp32, every ZeRO stage. Both are what a rank needs beyond its bare process."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


class SeenEnoughError(Exception):
    """Ends a run before its last checkpoint, which takes longer than its steps."""


def measured(config: Any) -> int:
    """How far this rank's memory rises above what it was before, in bytes, in two steps: the second has moments."""
    from ardist.training import trainer
    from ardist.training.callbacks.base import Callback

    peak = 0

    class Probe(Callback):
        def after_step(self, running: Any) -> None:
            nonlocal peak
            peak = status("VmHWM")
            if running.step == 2:
                raise SeenEnoughError

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    with contextlib.suppress(SeenEnoughError):
        trainer.train(config, [Probe()])
    return peak - before


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_planned_memory_is_within_ten_percent_of_the_measured_peak(tmp_path: Path) -> None:
    # A process of its own: the allocator must give freed memory back, or the peak shows its habits.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    words = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=800, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("stage")]
    assert len(ratios) == 8
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios), done.stdout


def compare(directory: Path) -> None:
    """Print planned and measured MiB of every stage, above those of a model of almost no size."""
    sys.path.insert(0, str(HERE.parent / "distributed"))
    from ranks import run_ranks
    from tiny import tiny_config, write_latents

    from ardist.plan.plan import make_plan

    data = write_latents(directory / "latents", frames=16)
    small = {"preset": "small", "tokens_per_frame": 3, "latent_channels": 4}

    def peak(name: str, **changes: Any) -> tuple[Any, int]:
        config = tiny_config(
            directory / name, data, training__steps=2, training__global_batch_size=4, checkpoint__every=9, **changes
        )
        return config, max(run_ranks(measured, 2, config, timeout=200))

    gc.freeze()  # DeepSpeed collects garbage as it starts; the ranks need not look at what they have from here
    kinds = {"fp32": {"training__precision": "fp32"}}
    # Two micro-batches per step, so that their gradients are added up: in fp32 where DeepSpeed can.
    kinds["bf16"] = {"training__precision": "bf16", "training__micro_batch_size": 1}
    for kind, changes in kinds.items():
        _, nothing = peak(f"nothing-{kind}", **changes)
        for stage in range(4):
            config, total = peak(f"{kind}-{stage}", training__zero_stage=stage, denoiser=small, **changes)
            planned = make_plan(config, gpus=2, device="cpu").memory[stage, "none"].total / 2**20
            found = (total - nothing) / 2**20
            print(f"stage {stage} {kind}: planned {planned:.0f} MiB, measured {found:.0f}, {planned / found:.3f}")


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
