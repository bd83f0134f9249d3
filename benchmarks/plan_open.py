"""What a frozen plan costs: freezing it, and opening it in a worker, for plans of very different sizes.

    python benchmarks/plan_open.py --videos 10000 100000 1000000

The videos are invented (31 clips each, a key frame every second), as their facts are all that a plan holds. Each row
is two fresh processes: one freezes, one opens the plan and reads the clips of three shards, as a worker would.
Processor seconds; memory is the growth of the peak over what the process had with all modules loaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "data_tools"))

from dt_plans import invented_facts

from ardist.storage import LocalStorage, open_storage
from data_tools import layout
from data_tools.freeze import write_plan
from data_tools.parameters import BuildParameters
from data_tools.plan import load_plan
from data_tools.probed import Source

CLIPS, FRAMES, RATE = 31, 16, 25
SHARD = 4096


def source(number: int) -> Source:
    """One invented video of `CLIPS` clips."""
    count = CLIPS * FRAMES
    keyframes = tuple(str(second) for second in range(count // RATE))
    facts = invented_facts(number, count, rate=RATE, width=1280, height=720, keyframes=keyframes)
    name = f"part-{number // 1000:05d}/video-{number:09d}.mp4"
    return Source(name, 3_000_000 + number, f"{3_000_000 + number}-1700000000000000000", facts)


class CountedStorage(LocalStorage):
    """A folder that counts the bytes which are read."""

    bytes_read = 0

    def read(self, name: str, start: int | None = None, length: int | None = None, version: str | None = None) -> bytes:
        data = super().read(name, start, length, version)
        self.bytes_read += len(data)
        return data


def peak() -> int:
    """Largest resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def freeze(out: Path, videos: int) -> dict[str, float]:
    """Freeze the plan of `videos` videos at `out`."""
    sources: Iterator[Source] = map(source, range(videos))
    parameters = BuildParameters(samples_per_shard=SHARD)
    list(map(source, range(3)))
    before, begun = peak(), time.process_time()
    with tempfile.TemporaryDirectory(dir=out) as folder:
        write_plan(open_storage(str(out)), sources, parameters, "/videos", Path(folder))
    return {"seconds": time.process_time() - begun, "memory": peak() - before}


def work(out: Path) -> dict[str, float]:
    """Open the plan at `out` and read three shards."""
    storage = CountedStorage(out)
    before, begun = peak(), time.process_time()
    plan = load_plan(storage)
    assert plan is not None
    opened, header = time.process_time() - begun, storage.bytes_read
    begun = time.process_time()
    shards = sorted({0, plan.num_shards // 2, plan.num_shards - 1})
    clips = sum(len(plan.clips(shard)) for shard in shards)
    return {
        "clips": plan.header.num_clips,
        "rows": plan.header.rows_bytes,
        "header": header,
        "open": opened,
        "shard": (time.process_time() - begun) / len(shards),
        "read": (storage.bytes_read - header) / len(shards),
        "memory": peak() - before,
        "clips_read": clips,
    }


def alone(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """The result of a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    words = parser.parse_args()
    table = Table(title=f"plans of invented videos, {CLIPS} clips each, {SHARD} clips a shard")
    names = ("videos", "clips", "rows", "freeze", "memory", "header", "open", "read a shard", "of it", "memory")
    for name in names:
        table.add_column(name, justify="right")
    found = []
    for videos in words.videos:
        with tempfile.TemporaryDirectory(prefix="ardist-bench-") as folder:
            frozen = alone(freeze, Path(folder), videos)
            assert (Path(folder) / layout.PLAN).exists()
            opened = alone(work, Path(folder))
        found.append({"videos": videos, "freeze": frozen, "work": opened})
        mib = 2**20
        table.add_row(
            f"{videos:,}",
            f"{opened['clips']:,.0f}",
            f"{opened['rows'] / mib:.0f} MiB",
            f"{frozen['seconds']:.1f} s",
            f"{frozen['memory'] / mib:.0f} MiB",
            f"{opened['header'] / 1024:.1f} KiB",
            f"{opened['open'] * 1000:.1f} ms",
            f"{opened['shard'] * 1000:.0f} ms",
            f"{opened['read'] / 1024:.0f} KiB",
            f"{opened['memory'] / mib:.1f} MiB",
        )
    Console(width=140).print(table)
    if words.json is not None:
        words.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
