"""Whether a finished dataset is what its build committed: every byte that a reader will meet is checked."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ardist.data.errors import ShardError
from ardist.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, Sums, parse_manifest
from ardist.data.sample import decode_npy
from ardist.data.shard_writer import real_values
from ardist.data.tar_index import TarIndex, build_index
from ardist.errors import ArdistError, DataError
from ardist.storage import Storage, open_storage
from data_tools import layout
from data_tools.claim import Claim
from data_tools.finalize import Folded, committed, fold
from data_tools.plan import Plan, load_plan
from data_tools.sealed import unseal


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and with which object."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass
class Report:
    """What a verification found; `notes` are harmless."""

    url: str
    shards: int = 0
    samples: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)

    def guard(self, name: str, check: Callable[[], Any]) -> Any:
        """Run a check; an error of ours becomes a problem of `name` and None is returned."""
        try:
            return check()
        except ShardError as error:
            where = "" if error.offset is None else f" at byte {error.offset}"
            self.problems.append(Problem(name, f"{error.reason}{where}: {error.detail}"))
        except ArdistError as error:
            self.problems.append(Problem(name, str(error)))
        return None


def verify(url: str, *, quick: bool = False, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Check a dataset and return what is wrong with it.

    Always: manifest, sizes and indices of all shards, and, where the build's own records are there, that plan,
    commits, quarantine and manifest agree to the byte. Unless `quick`: every byte of every shard, its samples'
    shapes, that latents are finite and their statistics those of the manifest.
    """
    storage = open_storage(url)
    report = Report(storage.url)
    data = report.guard(MANIFEST_NAME, lambda: storage.read(MANIFEST_NAME))
    manifest: Manifest | None = None
    if data is not None:
        manifest = report.guard(MANIFEST_NAME, lambda: parse_manifest(data, MANIFEST_NAME))
    _check_build(storage, data, manifest, report)
    if manifest is None:
        return report
    keys: dict[int, str] = {}
    sizes = {info.name: info.size for info in storage.walk(layout.SHARDS)}
    for number, shard in enumerate(manifest.shards):
        _check_shard(storage, shard, manifest, sizes, keys, quick, report)
        report.shards += 1
        report.samples += shard.n
        on_shard(number + 1, len(manifest.shards))
    listed = {name for shard in manifest.shards for name in (shard.name, shard.index_name)}
    for name in sorted(set(sizes) - listed):
        report.notes.append(Problem(name, "belongs to no shard of the manifest; gc removes it"))
    return report


def _check_shard(
    storage: Storage,
    shard: ShardEntry,
    manifest: Manifest,
    sizes: dict[str, int],
    keys: dict[int, str],
    quick: bool,
    report: Report,
) -> None:
    if shard.name not in sizes:
        report.problems.append(Problem(shard.name, "missing"))
    elif sizes[shard.name] != shard.bytes:
        report.problems.append(Problem(shard.name, f"{sizes[shard.name]} bytes, the manifest says {shard.bytes}"))
    index = report.guard(shard.index_name, lambda: _open_index(storage, shard))
    if index is not None:
        _check_records(index, shard, manifest, keys, report)
    if quick or sizes.get(shard.name) != shard.bytes:
        return
    with tempfile.TemporaryDirectory(prefix="ardist-verify-") as folder:
        path = storage.local_path(shard.name) or Path(folder) / "shard.tar"
        if storage.local_path(shard.name) is None:
            report.guard(shard.name, lambda: storage.download(shard.name, path))
        rebuilt = report.guard(shard.name, lambda: _rebuild(path, shard))
        if rebuilt is None:
            return
        if rebuilt.tar_sha256 != shard.sha256:
            report.problems.append(Problem(shard.name, f"sha256 {rebuilt.tar_sha256[:16]}…, not {shard.sha256[:16]}…"))
        if index is not None and rebuilt.to_bytes() != index.to_bytes():
            report.problems.append(Problem(shard.index_name, "does not describe the tar beside it"))
        report.guard(shard.name, lambda: _check_values(path, rebuilt, shard))


def _rebuild(path: Path, shard: ShardEntry) -> TarIndex:
    return build_index(path, shape=shard.shape, dtype=shard.dtype, context=shard.context_shape)


def _open_index(storage: Storage, shard: ShardEntry) -> TarIndex:
    data = storage.read(shard.index_name)
    found = hashlib.sha256(data).hexdigest()
    if found != shard.index_sha256:
        raise DataError(f"sha256 {found[:16]}…, not {shard.index_sha256[:16]}…")
    return TarIndex.open(data, name=shard.name, n=shard.n, tar_size=shard.bytes, tar_sha256=shard.sha256)


def _check_records(
    index: TarIndex, shard: ShardEntry, manifest: Manifest, keys: dict[int, str], report: Report
) -> None:
    for key in index.records["key"].tolist():
        other = keys.setdefault(key, shard.name)
        if other is not shard.name:
            report.problems.append(Problem(shard.name, f"sample {key:016x} stands in {other} as well"))
    highest = int(index.records["class_id"].max(initial=-1))
    if highest >= len(manifest.classes or ()):
        report.problems.append(Problem(shard.name, f"class {highest} of {len(manifest.classes or ())} classes"))


def _check_values(path: Path, index: TarIndex, shard: ShardEntry) -> None:
    """Latents are finite and sum to what the manifest says; pixels may have any value."""
    if shard.sums is None:
        return
    count, total, squares = 0, np.zeros(shard.shape[-1]), np.zeros(shard.shape[-1])
    with path.open("rb") as file:
        for record in index.records:
            file.seek(int(record["offset"]))
            array = decode_npy(file.read(int(record["size"])), shard.shape, shard.dtype)
            values = real_values(array, shard.dtype).reshape(-1, shard.shape[-1]).astype(np.float64)
            if not np.isfinite(values).all():
                raise DataError(f"sample {int(record['key']):016x} holds NaN or infinity")
            count, total, squares = count + len(values), total + values.sum(0), squares + (values * values).sum(0)
    found = Sums(count=count, total=tuple(total), squares=tuple(squares))
    if found.count != shard.sums.count or not np.allclose(found.total, shard.sums.total, rtol=1e-9, atol=1e-6):
        raise DataError("the sums of its latents are not those of the manifest")
    if not np.allclose(found.squares, shard.sums.squares, rtol=1e-9):
        raise DataError("the squared sums of its latents are not those of the manifest")


def _check_build(storage: Storage, data: bytes | None, manifest: Manifest | None, report: Report) -> None:
    """Plan, claim, commits and quarantine against the manifest; a dataset that was copied without them is fine."""
    plan = report.guard(layout.PLAN, lambda: load_plan(storage))
    there = {name for name in (layout.CLAIM, layout.PLAN) if storage.exists(name)}
    if not there and not committed(storage):
        report.notes.append(Problem(layout.PLAN, "the records of the build are not here: provenance is not checked"))
        return
    for name in sorted({layout.CLAIM, layout.PLAN} - there):
        report.problems.append(Problem(name, "missing"))
    if plan is None:
        return
    if layout.CLAIM in there:
        report.guard(layout.CLAIM, lambda: _check_claim(storage, plan))
    rows = plan.header.rows_name
    report.problems.extend(Problem(rows, str(error)) for error in plan.damage())
    report.notes.extend(
        Problem(name, "belongs to no plan; gc removes it") for name in storage.list(layout.ROWS) if name != rows
    )
    expected, found = hashlib.sha256(), hashlib.sha256()
    folded: Folded | None = report.guard(layout.COMMITS, lambda: fold(storage, plan, expected.update))
    if folded is None:
        return
    readable = report.guard(layout.QUARANTINE, lambda: storage.stream(layout.QUARANTINE, found.update)) is not None
    if readable and found.digest() != expected.digest():
        report.problems.append(Problem(layout.QUARANTINE, "is not what plan and commits say"))
    if data is not None and manifest is not None and folded.manifest is not None and data != folded.manifest.dump():
        report.problems.append(Problem(MANIFEST_NAME, "is not what plan and commits say"))
    for extra in sorted(shard for shard in committed(storage) if shard >= plan.num_shards):
        report.problems.append(Problem(layout.commit_name(extra), f"the plan has {plan.num_shards} shards"))


def _check_claim(storage: Storage, plan: Plan) -> None:
    claim = unseal(storage.read(layout.CLAIM), layout.CLAIM)
    planned = Claim(claim.get("videos", ""), plan.parameters).settings()
    if planned != claim:
        raise DataError("its parameters are not those of the plan")
