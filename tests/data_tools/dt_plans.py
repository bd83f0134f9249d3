"""Plans of invented videos, and a storage that tells what was read of it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ardist.storage import Storage, open_storage
from data_tools.freeze import write_plan
from data_tools.parameters import BuildParameters
from data_tools.plan import Plan, load_plan
from data_tools.probe import VideoFacts
from data_tools.probed import Source

RATE = 12


def invented_facts(
    content: int, frames: int, *, rate: int, width: int, height: int, keyframes: tuple[str, ...]
) -> VideoFacts:
    """What a probe says of a good video; the same `content` is the same video."""
    return VideoFacts(
        sha256=hashlib.sha256(str(content).encode()).hexdigest(),
        format="mov",
        stream=0,
        codec="h264",
        width=width,
        height=height,
        pix_fmt="yuv420p",
        sar="1",
        container_start="0",
        rate=str(rate),
        start="0",
        last=f"{frames - 1}/{rate}",
        count=frames,
        max_gap=f"1/{rate}",
        by_index=False,
        decoding_times=False,
        interlaced=False,
        alpha=False,
        hdr=False,
        matrix_unknown=False,
        keyframes=keyframes,
    )


def invented(number: int, frames: int = 12, content: int | None = None, **changes: Any) -> Source:
    """A good small video of `frames` frames; the same `content` is the same video."""
    content = number if content is None else content
    facts = invented_facts(content, frames, rate=RATE, width=48, height=32, keyframes=("0", "1/2"))
    fields = {"name": f"{number:05d}.mp4", "size": 1000 + number, "version": f"v{number}", "facts": facts} | changes
    return Source(**fields)


def small(**changes: Any) -> BuildParameters:
    """Clips of four frames, four to a shard."""
    return BuildParameters(**{"num_frames": 4, "size": 16, "stride": 4, "samples_per_shard": 4, **changes})


def frozen(out: str | Path, sources: Iterable[Source], root: str = "/videos", **changes: Any) -> Plan:
    """The plan of some sources at `out`."""
    storage = open_storage(str(out))
    with tempfile.TemporaryDirectory() as folder:
        write_plan(storage, sources, small(**changes), root, Path(folder))
    plan = load_plan(storage)
    assert plan is not None
    return plan


class Watched:
    """A storage that notes every range which is read: (name, start, bytes)."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read(self, name: str, start: int | None = None, length: int | None = None) -> bytes:
        data = self._storage.read(name, start, length)
        self.reads.append((name, start or 0, len(data)))
        return data

    def stream(self, name: str, take: Callable[[bytes], object], start: int = 0, length: int | None = None) -> int:
        count = self._storage.stream(name, take, start, length)
        self.reads.append((name, start, count))
        return count

    def new_reads(self) -> Iterator[tuple[str, int, int]]:
        """What was read since the last call."""
        reads, self.reads = self.reads, []
        return iter(reads)
