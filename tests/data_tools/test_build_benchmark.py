"""What the builder's benchmarks report beside rates."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

MIB = 2**20


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("build")


def test_a_plan_is_measured_by_what_a_worker_reads(tmp_path: Path, load_benchmark: Callable[[str], ModuleType]) -> None:
    """All bytes are counted, and of each of the plan's shards all clips are read where there are no more than three."""
    measure = load_benchmark("plan_open")
    measure.SHARD = 600
    measure.freeze(tmp_path, 40)
    found = measure.work(tmp_path)
    assert found["clips"] == found["clips_read"] == 40 * measure.CLIPS
    assert found["header"] == (tmp_path / "plan.json").stat().st_size
    assert found["rows"] == next((tmp_path / "plan").iterdir()).stat().st_size
    assert found["rows"] - 100 < found["read"] * 3 < found["rows"], "shards and their page, not what was refused"


def test_the_memory_of_children_counts(benchmark: ModuleType) -> None:
    """A build decodes in children: memory that only they hold is the build's too, and that of the dead is nobody's."""
    hold = "held = bytearray(b'x') * (200 * 2**20); print(flush=True); input()"
    with benchmark.MemoryWatch() as watch:

        def wait() -> int:
            seen = len(watch.samples)
            while len(watch.samples) < seen + 2:
                time.sleep(0.02)
            return int(watch.samples[-1])

        before = wait()
        with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            during = wait()
            child.communicate(b"\n")
        after = wait()
    assert during - before > 150 * MIB
    assert during - after > 150 * MIB
