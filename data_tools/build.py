"""The whole build: freeze a plan, let workers lease and commit its shards, fold the commits into a manifest."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from ardist import fault
from ardist.config.loading import check
from ardist.data.manifest import Manifest
from ardist.data.sample import npy_size
from ardist.errors import DataError, choose
from ardist.events import events
from ardist.storage import Storage, is_remote, open_storage
from data_tools import layout
from data_tools.claim import Claim, take
from data_tools.encode import Encoder, EncoderChoice, default_threads
from data_tools.finalize import Folded, committed, finalize, fold, standing_manifest
from data_tools.freeze import Freezer, tool_versions
from data_tools.labels import Labels
from data_tools.lease import Pace
from data_tools.listing import freeze_listing
from data_tools.parameters import BuildParameters, default_samples_per_shard
from data_tools.plan import Plan, load_plan
from data_tools.progress import Progress, SilentProgress
from data_tools.shard import ShardSettings
from data_tools.staging import staging_folder
from data_tools.worker import run_worker
from data_tools.workers import Task, WorkerPool

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class BuildOptions:
    """How a build is run here; none of it changes the dataset."""

    workers: int = 1
    probers: int = 0
    max_bad: float = 1.0
    probe_timeout: float = 60.0
    pace: Pace = field(default_factory=Pace)
    shard: ShardSettings = field(default_factory=ShardSettings)
    start_method: str = "spawn"
    executor: str = "local"

    def __post_init__(self) -> None:
        choose("executor", self.executor, EXECUTORS)


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
    encoder: EncoderChoice,
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
        plan = plan or _freeze(storage, claim, labels, options, progress)
        warn_of_other_tools(plan)
        progress.planned(plan.num_shards, plan.header.num_clips, len(committed(storage)))
        task = Task(out, encoder, options.shard, options.pace)
        if options.executor == "ray":
            from data_tools.ray_executor import RayPool

            RayPool(task, options.workers, progress).run(storage, plan)
        elif options.workers > 1:
            WorkerPool(task, options.workers, progress, options.start_method).run(storage, plan)
        else:
            with staging_folder(storage) as staging:
                run_worker(plan, storage, encoder.make(), options.shard, options.pace, staging, progress)
        fault.point("build.before_finalize")
        folded = finalize(storage, plan)
        manifest = folded.manifest
        assert manifest is not None
        for name in list(storage.list(layout.LEASES)):
            storage.delete(name)
    else:
        folded = fold(storage, plan)
    summary = _summary(storage, plan, folded, manifest, time.monotonic() - begun, reused)
    progress.finished(summary)
    if summary.bad_fraction > options.max_bad:
        raise DataError(
            f"{summary.bad_fraction:.1%} was refused, above --max-bad {options.max_bad:g}: {summary.reasons}; "
            f"the dataset at {storage.url} is complete without it, see {layout.QUARANTINE}"
        )
    return summary


def _freeze(storage: Storage, claim: Claim, labels: Labels | None, options: BuildOptions, progress: Progress) -> Plan:
    """List and probe, together with whoever else is at it; the plan that stands afterwards."""
    freeze_listing(storage, claim)
    with staging_folder(storage) as staging:
        freezer = Freezer(
            storage,
            claim,
            labels,
            workers=options.probers or default_threads(),
            timeout=options.probe_timeout,
            pace=options.pace,
            staging=staging,
            on_probed=progress.probed,
        )
        return freezer.plan()


def warn_of_other_tools(plan: Plan) -> None:
    """Say so when this machine's tools are not those that the plan was made with."""
    for name, version in tool_versions(plan.parameters).items():
        planned = plan.header.tools.get(name)
        if planned != version:
            events.count("build.other_tool", tool=name, planned=planned, here=version)


def _summary(storage: Storage, plan: Plan, folded: Folded, manifest: Manifest, seconds: float, reused: bool) -> Summary:
    header = plan.header
    return Summary(
        manifest=manifest,
        url=storage.url,
        videos=header.num_videos,
        refused_videos=header.num_bad,
        duplicates=header.num_duplicates,
        clips_planned=header.num_clips,
        refused_clips=folded.refused_clips,
        reasons=folded.top_reasons,
        seconds=seconds,
        reused=reused,
        events=events.snapshot(),
    )
