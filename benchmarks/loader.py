"""Samples per second of our loader against its peers: interleaved runs, one process each, results checked.

    python benchmarks/loader.py                          small and large samples from the page cache, against webdataset
    python benchmarks/loader.py --http                   and over loopback HTTP
    python benchmarks/loader.py --create-peers DIR       and litdata, mosaicml-streaming, torchdata in an environment
                                                         of their own, which is made in DIR first (--peers DIR: reused)

Every reader delivers the same float16 tensors in batches of the same size, shuffled over about the same number of
samples (ours: lanes x window; webdataset: a buffer as large; the others by their own method), and every row says
whether it delivered each sample exactly once (ours leaves what does not fill the last batch to later epochs). Ours
verifies every sample's checksum; no other reader does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from object_server import serve

from ardist.data.manifest import fold_shards, load_manifest, write_manifest
from ardist.data.sample import SampleInfo, sample_key
from ardist.data.shard_writer import Sample, write_shard

PEERS = ["litdata", "mosaicml-streaming", "torchdata"]
WHAT_PEERS_IMPORT = ["lightning-utilities", "obstore", "brotli", "zstd", "python-snappy", "cramjam", "catalogue"]
READERS_FILE = Path(__file__).with_name("loader_readers.py")


@dataclass
class Profile:
    """One kind of sample."""

    name: str
    shape: tuple[int, ...]
    samples: int
    per_shard: int
    prefetch: int

    @property
    def bytes(self) -> int:
        """Of one sample."""
        return 2 * math.prod(self.shape)


@dataclass
class Row:
    """The runs of one reader."""

    reader: str
    rates: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    correct: bool = True
    left: int = 0


def make_dataset(folder: Path, profile: Profile) -> None:
    """Random normal latents whose first two values are the sample's number; reused when it is there already."""
    with contextlib.suppress(Exception):
        if load_manifest(folder).num_samples == profile.samples:
            return
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((64, *profile.shape)).astype(np.float16)
    entries = []
    for shard, first in enumerate(range(0, profile.samples, profile.per_shard)):
        samples = []
        for number in range(first, min(first + profile.per_shard, profile.samples)):
            array = noise[number % 64].copy()
            array.reshape(-1)[:2] = number // 2048, number % 2048
            info = SampleInfo(source=f"video-{number}.mp4", frames=profile.shape[0], fps=8.0)
            samples.append(Sample(sample_key(str(number), (0, 1), {}), array, info))
        entries.append(write_shard(folder, shard, samples, "float16"))
    identity = {"weights_digest": "0" * 64, "config_digest": "0" * 64}
    header = {"dataset_id": profile.name, "created": "", "code_version": "bench", "kind": "latents", "vae": identity}
    write_manifest(folder, fold_shards(entries, **header))


def read_ceiling(folder: Path) -> float:
    """Bytes per second of plain sequential reads of all tars into one reused buffer, once they are cached."""
    buffer = memoryview(bytearray(2**20))
    rate = 0.0
    for _ in range(2):
        total, begun = 0, time.perf_counter()
        for path in sorted((folder / "shards").glob("*.tar")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
        rate = total / (time.perf_counter() - begun)
    return rate


def run(python: str, reader: str, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """One process of loader_readers.py."""
    command = [python, str(READERS_FILE), reader, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if result.returncode:
        raise RuntimeError(f"{reader} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1]) if not reader.startswith("prepare") else {}


def batch_of(profile: Profile, options: argparse.Namespace) -> int:
    """--batch, or what a dataset with fewer samples than that fills."""
    if profile.samples >= options.batch:
        return int(options.batch)
    return max(1, profile.samples // int(options.lanes)) * int(options.lanes)


def measure(
    profile: Profile, folder: Path, readers: dict[str, str], repeats: int, http: bool, options: argparse.Namespace
) -> list[Row]:
    """Interleaved epochs: every reader once, then every reader again.

    The first rounds (--warm-up) are checked like the others but not timed: they bring the files of every reader into
    the system's cache, and compiled modules to disk, for all alike.
    """
    rows = {name: Row(name) for name in readers}
    with serve(folder.parent) if http else contextlib.nullcontext("") as address:
        arguments = [
            *("--manifest", str(folder / "manifest.json"), "--converted", str(folder.with_suffix(".peers"))),
            *("--shape", *map(str, profile.shape), "--prefetch", str(profile.prefetch)),
            *(
                "--batch",
                str(batch_of(profile, options)),
                "--lanes",
                str(options.lanes),
                "--window",
                str(options.window),
            ),
        ]
        data = f"s3://bench/{folder.name}" if http else str(folder)
        urls = f"{address}/bench/{folder.name}" if http else str(folder)
        environment = {
            "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for number in range(options.warm_up + repeats):
            for name, python in readers.items():
                with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
                    more = ["--data", data, "--urls", urls, "--cache", cache]
                    result = run(python, name, [*arguments, *more], environment)
                row = rows[name]
                if number >= options.warm_up:
                    row.rates.append(result["samples"] / result["seconds"])
                    row.first.append(result["first"])
                    row.cpu.append(result["cpu"] / result["samples"])
                row.left = profile.samples - result["distinct"]
                # Nothing twice, nothing foreign, and at most what does not fill the last batch left for later epochs.
                row.correct &= result["samples"] == result["distinct"] and 0 <= row.left < batch_of(profile, options)
                row.correct &= result["lowest"] >= 0 and result["highest"] < profile.samples
    return list(rows.values())


def peers_environment(folder: Path, create: bool) -> str:
    """The Python of the environment that holds the peers; makes it first when asked to.

    The environment sees the packages of this one and adds the peers without what they depend on, because pip would
    replace torch for them.
    """
    python = folder / "bin" / "python"
    if create:
        venv.create(folder, with_pip=True)
        own = sysconfig.get_path("purelib", vars={"base": str(folder)})
        (Path(own) / "measuring_environment.pth").write_text(sysconfig.get_path("purelib"))
        packages = [*PEERS, *WHAT_PEERS_IMPORT]
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], check=True)
    if not python.exists():
        raise SystemExit(f"{folder} holds no Python environment; make one with --create-peers {folder}")
    return str(python)


def show(console: Console, title: str, profile: Profile, rows: list[Row], ceiling: float) -> None:
    """The table of one profile and place."""
    table = Table(
        "reader", "samples/s", "MB/s", "CPU µs/sample", "first batch", "ours is", "each sample once", title=title
    )
    ours = statistics.median(next(row for row in rows if row.reader == "ardist").rates)
    for row in sorted(rows, key=lambda row: -statistics.median(row.rates)):
        rate = statistics.median(row.rates)
        ratio = "" if row.reader == "ardist" else f"{ours / rate:.1f}x"
        table.add_row(
            row.reader,
            f"{rate:,.0f}",
            f"{rate * profile.bytes / 1e6:,.0f}",
            f"{statistics.median(row.cpu) * 1e6:,.1f}",
            f"{statistics.median(row.first):.2f} s",
            ratio,
            ("yes" if not row.left else f"yes, but {row.left} of the last batch") if row.correct else "NO",
        )
    console.print(table)
    share = ours * profile.bytes / ceiling
    console.print(f"plain sequential reading: {ceiling / 1e6:,.0f} MB/s; ours, with checksums: {share:.2f} of it\n")


def resume_time(profile: Profile, folder: Path, options: argparse.Namespace) -> float:
    """Seconds from opening to the first batch at 90% of an epoch."""
    arguments = [
        *("--data", str(folder), "--manifest", str(folder / "manifest.json"), "--urls", str(folder)),
        *("--shape", *map(str, profile.shape), "--prefetch", str(profile.prefetch), "--resume-at", "0.9"),
        *("--batch", str(batch_of(profile, options)), "--lanes", str(options.lanes), "--window", str(options.window)),
    ]
    return float(run(sys.executable, "ardist", arguments, {})["first"])


def readers_of(options: argparse.Namespace, folder: Path, profile: Profile) -> Iterator[tuple[str, str]]:
    """(reader, its Python); converts the dataset for the peers that need it."""
    yield from ((name, sys.executable) for name in ("ardist", "webdataset-0", "webdataset-2"))
    if options.peers is None and options.create_peers is None:
        return
    python = peers_environment(options.create_peers or options.peers, options.create_peers is not None)
    arguments = ["--data", str(folder), "--manifest", str(folder / "manifest.json"), "--urls", str(folder)]
    converted = folder.with_suffix(".peers")
    for peer in ("litdata", "mosaic"):
        if not (converted / peer).exists():
            more = ["--converted", str(converted), "--shape", *map(str, profile.shape)]
            run(python, f"prepare-{peer}", [*arguments, *more], {})
    yield from ((name, python) for name in ("litdata-0", "litdata-2", "mosaic-0", "mosaic-2", "torchdata-2"))


def main() -> None:
    """Build the datasets, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ardist-bench-loader")
    parser.add_argument("--small", type=int, default=100_000, help="samples of 8 KiB; 0: none")
    parser.add_argument("--large", type=int, default=2_000, help="samples of 1 MiB; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that are not timed")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--create-peers", type=Path)
    options = parser.parse_args()
    console = Console()
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    profiles = [
        Profile("small", (16, 64, 4), options.small, 1000, 256 * 2**20),
        Profile("large", (16, 1024, 32), options.large, 40, 256 * 2**20),
    ]
    for profile in (profile for profile in profiles if profile.samples):
        folder = options.folder / profile.name
        make_dataset(folder, profile)
        readers = dict(readers_of(options, folder, profile))
        ceiling = read_ceiling(folder)
        title = f"{profile.samples:,} samples of {profile.bytes // 1024} KiB"
        rows = measure(profile, folder, readers, options.repeats, False, options)
        show(console, f"{title}, local files", profile, rows, ceiling)
        console.print(f"first batch after a resume at 90%: {resume_time(profile, folder, options):.2f} s\n")
        if options.http:
            served = {
                name: python for name, python in readers.items() if name.split("-")[0] in ("ardist", "webdataset")
            }
            rows = measure(profile, folder, served, options.repeats, True, options)
            show(console, f"{title}, loopback HTTP, nothing cached", profile, rows, ceiling)
        options.create_peers, options.peers = None, options.create_peers or options.peers


if __name__ == "__main__":
    main()
