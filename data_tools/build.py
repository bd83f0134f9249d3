"""The whole build: freeze a plan, let workers lease and commit its shards, fold the commits into a manifest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ardist import fault
from ardist.config.loading import check
from ardist.data.manifest import Manifest
from ardist.data.sample import npy_size
from ardist.errors import DataError
from ardist.events import events
from ardist.storage import LocalStorage, Storage, is_remote, open_storage
from data_tools import layout
from data_tools.encode import Encoder, default_threads
from data_tools.finalize import (
    committed,
    finalize,
    missing_commits,
    quarantined,
    standing_manifest,
    top_reasons,
)
from data_tools.freeze import Claim, Freezer, freeze_listing, load_plan, take, tool_versions
from data_tools.labels import Labels
from data_tools.lease import Leases, worker_name
from data_tools.parameters import BuildParameters, default_samples_per_shard
from data_tools.plan import Plan
from data_tools.progress import Progress, SilentProgress
from data_tools.reasons import Reason
from data_tools.shard import Counts, ShardBuilder, ShardSettings, read_commit
from data_tools.sources import SourceRoot

STAGING = ".tmp-build-"


@dataclass(frozen=True)
class BuildOptions:
    """How a build is run here; none of it changes the dataset."""

    workers: int = 1
    decoders: int = 0
    max_bad: float = 1.0
    lease_seconds: float = 60.0
    probe_timeout: float = 60.0
    poll_seconds: float = 1.0
    shard: ShardSettings = field(default_factory=ShardSettings)


@dataclass
class Summary:
    """What stands at the end, for people and for the exit code."""

    manifest: Manifest
    url: str
    videos: int
    refused_videos: int
    duplicates: int
    clips_planned: int
    refused_clips: int
    reasons: str
    seconds: float
    reused: bool
    events: dict[str, int] = field(default_factory=dict)

    @property
    def bad_fraction(self) -> float:
        """Refused videos of all videos or refused clips of all planned clips, whichever is larger."""
        return max(self.refused_videos / max(1, self.videos), self.refused_clips / max(1, self.clips_planned))


def make_parameters(encoder: Encoder, *, samples_per_shard: int | None = None, **settings: Any) -> BuildParameters:
    """Parameters with the shard size filled in from the size of a sample."""
    fields = {"encoder": encoder.identity, "samples_per_shard": samples_per_shard or 1, **settings}
    draft = check(BuildParameters, fields, "build parameters")
    shape = encoder.sample_shape(draft.num_frames, draft.size)
    size = npy_size(shape, encoder.dtype) + 3 * 512
    return draft.model_copy(update={"samples_per_shard": samples_per_shard or default_samples_per_shard(size)})


def build(
    videos: str,
    out: str,
    encoder: Encoder,
    parameters: BuildParameters,
    *,
    labels: Labels | None = None,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Build, continue or find finished the dataset of `videos` at `out`.

    Raises `ConfigError` for no videos or an output that holds something else, `DataError` when nothing could be
    used or more than `options.max_bad` was refused (the dataset is finished and usable then), `HardwareError` for
    a store or device that fails.
    """
    options, progress = options or BuildOptions(), progress or SilentProgress()
    begun = time.monotonic()
    storage = open_storage(out)
    address = videos if is_remote(videos) else os.path.abspath(os.path.expanduser(videos.removeprefix("file://")))
    claim = Claim(address, parameters)
    if storage.exists(layout.CLAIM) or standing_manifest(storage) is not None:
        take(storage, claim)
    manifest, plan = standing_manifest(storage), load_plan(storage)
    reused = manifest is not None and plan is not None
    if manifest is None or plan is None:
        if plan is None:
            freeze_listing(storage, claim)
        with staging_folder(storage) as staging:
            freezer = Freezer(
                storage,
                claim,
                labels,
                workers=options.decoders or default_threads(),
                timeout=options.probe_timeout,
                staging=staging,
                on_probed=progress.probed,
            )
            plan = freezer.plan()
            warn_of_other_tools(plan)
            progress.planned(plan.num_shards, len(plan.rows), len(committed(storage)))
            run_worker(plan, claim, storage, encoder, options, staging, progress)
        fault.point("build.before_finalize")
        manifest = finalize(storage, plan)
        for name in list(storage.list(layout.LEASES)):
            storage.delete(name)
    summary = _summary(storage, plan, manifest, time.monotonic() - begun, reused)
    progress.finished(summary)
    if summary.bad_fraction > options.max_bad:
        raise DataError(
            f"{summary.bad_fraction:.1%} was refused, above --max-bad {options.max_bad:g}: {summary.reasons}; "
            f"the dataset at {storage.url} is complete without it, see {layout.QUARANTINE}"
        )
    return summary


def run_worker(
    plan: Plan,
    claim: Claim,
    storage: Storage,
    encoder: Encoder,
    options: BuildOptions,
    staging: Path,
    progress: Progress,
) -> int:
    """Lease and build shards until all are committed, by whomever; returns how many this worker built."""
    if not len(plan.rows):
        return 0
    worker = worker_name()
    leases = Leases(storage, worker, options.lease_seconds)
    root = SourceRoot(claim.videos if is_remote(claim.videos) else _local_root(claim.videos))
    settings = options.shard
    builder = ShardBuilder(plan, root, storage, encoder, settings, staging)
    turn = int.from_bytes(hashlib.sha256(worker.encode()).digest()[:4], "little")
    built = 0
    while holes := missing_commits(storage, plan):
        took_one = False
        at = turn % len(holes)
        for shard in holes[at:] + holes[:at]:
            lease = leases.take(shard)
            if lease is None:
                continue
            took_one = True
            with lease:
                if storage.exists(layout.commit_name(shard)):
                    continue
                builder.on_progress = lambda counts, shard=shard: progress.advanced(shard, counts)  # type: ignore[misc]
                commit = builder.build(shard, worker)
            built += 1
            progress.committed(shard, _counts(commit))
        if not took_one:
            time.sleep(options.poll_seconds)
    return built


def _counts(commit: dict[str, Any]) -> Counts:
    entry = commit["entry"]
    return Counts(clips=entry["n"] if entry else 0, refused=len(commit["quarantine"]), frames=commit["frames"])


def _local_root(videos: str) -> str:
    """The folder that listed names are relative to: of a single file or a list, the folder it lies in."""
    return videos if os.path.isdir(videos) else os.path.dirname(videos)


def warn_of_other_tools(plan: Plan) -> None:
    """Say so when this machine's tools are not those that the plan was made with."""
    for name, version in tool_versions().items():
        if plan.tools.get(name) != version:
            events.count("build.other_tool", tool=name, planned=plan.tools.get(name), here=version)


@contextlib.contextmanager
def staging_folder(storage: Storage) -> Iterator[Path]:
    """A private folder for unfinished shards, beside a local output so that finishing is a rename.

    Folders of builders that died are removed on the way: nobody holds their lock any more.
    """
    parent = storage.root if isinstance(storage, LocalStorage) else Path(tempfile.gettempdir())
    _remove_dead(parent)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=STAGING))
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_dead(parent: Path) -> None:
    for folder in parent.glob(f"{STAGING}*"):
        try:
            descriptor = os.open(folder / "lock", os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            events.count("build.staging_removed", folder=folder, level=20)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def _summary(storage: Storage, plan: Plan, manifest: Manifest, seconds: float, reused: bool) -> Summary:
    commits = [read_commit(storage, shard, plan) for shard in range(plan.num_shards)]
    records = quarantined(plan, commits)
    bad = [source for source in plan.sources if source.refused and Reason(str(source.refused["reason"])).is_bad]
    return Summary(
        manifest=manifest,
        url=storage.url,
        videos=len(plan.sources),
        refused_videos=len(bad),
        duplicates=sum(source.refused is not None for source in plan.sources) - len(bad),
        clips_planned=len(plan.rows),
        refused_clips=sum(len(commit["quarantine"]) for commit in commits),
        reasons=top_reasons(records),
        seconds=seconds,
        reused=reused,
        events=events.snapshot(),
    )
