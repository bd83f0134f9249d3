"""Building one shard: decode ahead, encode in batches, write once, commit by a conditional create."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ardist import fault
from ardist.data.manifest import ShardEntry
from ardist.data.sample import SampleInfo
from ardist.data.shard_writer import Sample, write_shard
from ardist.errors import DataError
from ardist.events import events
from ardist.storage import Storage
from data_tools import layout
from data_tools.bounded import OrderedWork
from data_tools.decode import DecodeSettings, Target, decode_stretch, stretches
from data_tools.encode import Encoder, Stored
from data_tools.fetch import local_copy
from data_tools.frame_stream import Frames
from data_tools.plan import Clip, Plan, jobs_of
from data_tools.probed import shown_name
from data_tools.reasons import Refusal
from data_tools.sealed import seal, unseal
from data_tools.sources import SourceRoot


@dataclass
class Counts:
    """What a shard took, for progress and the final table."""

    shard: int = 0
    clips: int = 0
    refused: int = 0
    frames: int = 0
    queue_fill: float = 0.0


@dataclass(frozen=True)
class ShardSettings:
    """How shards are built here; none of it changes their bytes."""

    decoders: int = 1
    queue_bytes: int = 512 * 2**20
    decode: DecodeSettings = field(default_factory=DecodeSettings)


@dataclass
class ShardBuilder:
    """Builds shards of one plan into one storage."""

    plan: Plan
    out: Storage
    encoder: Encoder
    settings: ShardSettings
    staging: Path
    on_progress: Callable[[int, Counts], None] = lambda shard, counts: None

    def build(self, shard: int, worker: str) -> dict[str, Any]:
        """Build and commit one shard; returns the commit that stands afterwards, ours or that of who was faster."""
        fault.point("build.shard_started")
        begun = time.monotonic()
        refusals: list[dict[str, object]] = []
        counts = Counts(shard=shard)
        samples = self._samples(shard, refusals, counts)
        entry = self._write(shard, samples)
        fault.point("build.shard_written")
        commit = {
            "shard": shard,
            "plan": self.plan.digest,
            "entry": entry.model_dump(mode="json") if entry else None,
            "quarantine": sorted(refusals, key=lambda record: str(record["row"]).zfill(20)),
            "frames": counts.frames,
            "worker": worker,
            "seconds": round(time.monotonic() - begun, 3),
        }
        if entry is not None:
            self._upload(entry)
        fault.point("build.before_commit")
        name = layout.commit_name(shard)
        if self.out.create(name, seal(commit)):
            fault.point("build.after_commit")
            return commit
        standing = read_commit(self.out, shard, self.plan)
        events.count("build.commit_lost", shard=shard, winner=standing["worker"])
        if entry is not None and (standing["entry"] is None or standing["entry"]["name"] != entry.name):
            self.out.delete(entry.name)
            self.out.delete(entry.index_name)
        return standing

    def _write(self, shard: int, samples: Iterator[Sample]) -> ShardEntry | None:
        first = next(samples, None)
        if first is None:
            return None

        def all_samples() -> Iterator[Sample]:
            yield first
            yield from samples

        return write_shard(
            self.staging, shard, all_samples(), self.encoder.dtype, with_sums=self.encoder.identity.kind == "latents"
        )

    def _upload(self, entry: ShardEntry) -> None:
        """Put index and tar under their content-derived names; the staged files are consumed."""
        for number, name in enumerate((entry.index_name, entry.name)):
            fault.point(f"build.before_upload_{number}")
            self.out.put(name, self.staging / name, move=True)
            (self.staging / name).unlink(missing_ok=True)
        fault.point("build.after_upload")

    def _samples(self, shard: int, refusals: list[dict[str, object]], counts: Counts) -> Iterator[Sample]:
        """The shard's samples in plan order; what is refused goes to `refusals`."""
        jobs = [job for video in jobs_of(self.plan.clips(shard)) for job in self._stretches(video)]
        work = OrderedWork(
            jobs,
            self._decode,
            threads=self.settings.decoders,
            max_bytes=self.settings.queue_bytes,
            size_of=lambda item: item[1].nbytes if isinstance(item[1], np.ndarray) else 1,
        )
        for clips, frames in work:
            counts.queue_fill = work.fill
            if isinstance(frames, Refusal):
                self._refuse(clips, frames, "decode", refusals, counts)
                continue
            counts.frames += len(frames)
            offsets = [clip.start - clips[0].start for clip in clips]
            encoded = self.encoder.encode(frames, offsets, self.plan.parameters.num_frames)
            for clip, result in zip(clips, encoded, strict=True):
                if isinstance(result, Refusal):
                    self._refuse([clip], result, "encode", refusals, counts)
                    continue
                counts.clips += 1
                self.on_progress(counts.shard, counts)
                fault.point("build.sample")
                yield self._sample(clip, result)

    def _refuse(
        self, clips: list[Clip], refusal: Refusal, stage: str, refusals: list[dict[str, object]], counts: Counts
    ) -> None:
        counts.refused += len(clips)
        name = shown_name(clips[0].video.name)
        events.count(f"build.refused.{refusal.reason}", len(clips), source=name, detail=refusal.detail)
        refusals.extend(refusal.record(name, stage, row=clip.row, start=clip.start) for clip in clips)
        self.on_progress(counts.shard, counts)

    def _sample(self, clip: Clip, array: Stored) -> Sample:
        info = {
            "source": shown_name(clip.video.name),
            "start": float(clip.start / clip.fps),
            "start_frame": clip.start,
            "fps": float(clip.fps),
            "frames": self.plan.parameters.num_frames,
            "class_id": clip.video.class_id,
            "caption": clip.video.caption,
        }
        return Sample(clip.key, np.ascontiguousarray(array), SampleInfo.model_validate(info))

    def _stretches(self, video: list[Clip]) -> Iterator[list[Clip]]:
        """The clips of one video, split into what one process decodes."""
        by_start = {clip.start: clip for clip in video}
        for starts in stretches(list(by_start), self._target(video[0]), bool(video[0].video.facts.keyframes)):
            yield [by_start[start] for start in starts]

    def _target(self, clip: Clip) -> Target:
        parameters = self.plan.parameters
        return Target(parameters.num_frames, clip.fps, parameters.size, parameters.max_pixels)

    def _decode(self, job: list[Clip]) -> Iterator[tuple[list[Clip], Frames | Refusal]]:
        video = job[0].video
        settings = replace(self.settings.decode, scratch=self.staging)
        by_start = {clip.start: clip for clip in job}
        try:
            root = SourceRoot(self.plan.header.root)
            others = (other for other in self.plan.header.readable if other != video.name)
            copy = local_copy(root, video.name, video.version, self.staging, video.facts.sha256, others=others)
            with copy as (path, version):
                target = self._target(job[0])
                for starts, frames in decode_stretch(path, version, video.facts, list(by_start), target, settings):
                    yield [by_start[start] for start in starts], frames
        except Refusal as refusal:
            yield job, refusal


def read_commit(out: Storage, shard: int, plan: Plan) -> dict[str, Any]:
    """A shard's commit; raises `DataError` when it belongs to another plan or is damaged."""
    name = layout.commit_name(shard)
    commit = unseal(out.read(name), f"{out.url}/{name}")
    if commit["shard"] != shard:
        raise DataError(f"{out.url}/{name} is the commit of shard {commit['shard']}")
    if commit["plan"] != plan.digest:
        raise DataError(f"{out.url}/{name} belongs to plan {commit['plan'][:12]}, this is plan {plan.digest[:12]}")
    return commit
