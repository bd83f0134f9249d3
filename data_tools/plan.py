"""The frozen plan: which clip of which video goes into which shard, fixed before the first frame is decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from ardist.config.base import canonical_digest
from ardist.data.sample import sample_key
from ardist.errors import DataError
from data_tools.parameters import BuildParameters
from data_tools.probe import VideoFacts
from data_tools.reasons import Reason, Refusal
from data_tools.sealed import seal, unseal
from data_tools.timing import clip_starts

FORMAT, VERSION = "ardist-plan", 1


@dataclass(frozen=True)
class Source:
    """One candidate after probing: facts, or why it is refused. A line of ``sources.jsonl``."""

    name: str
    size: int
    version: str
    facts: VideoFacts | None = None
    class_name: str | None = None
    caption: str | None = None
    refused: dict[str, object] | None = None

    def line(self) -> str:
        """Its line of ``sources.jsonl``."""
        fields: dict[str, Any] = {"name": self.name, "size": self.size, "version": self.version}
        if self.facts is not None:
            fields["facts"] = self.facts.as_json()
        for extra in ("class_name", "caption", "refused"):
            if getattr(self, extra) is not None:
                fields[extra] = getattr(self, extra)
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def parse(cls, line: str) -> Source:
        """The inverse of `line`."""
        fields = json.loads(line)
        facts = fields.pop("facts", None)
        return cls(**fields, facts=VideoFacts.from_json(facts) if facts else None)

    def refusal(self, refusal: Refusal, stage: str) -> Source:
        """This source, refused."""
        record = refusal.record(shown_name(self.name), stage)
        return Source(self.name, self.size, self.version, self.facts, self.class_name, self.caption, record)


def shown_name(name: str) -> str:
    """A name as valid UTF-8: bytes of a file name that are none become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def drop_duplicates(sources: Iterable[Source]) -> list[Source]:
    """Refuse every video whose content already stands earlier in the listing."""
    first: dict[str, str] = {}
    kept = []
    for source in sources:
        if source.facts is not None and source.refused is None:
            original = first.setdefault(source.facts.sha256, source.name)
            if original != source.name:
                refusal = Refusal(Reason.DUPLICATE, f"same content as {shown_name(original)}")
                source = source.refusal(refusal, "plan")
        kept.append(source)
    return kept


@dataclass(frozen=True)
class Clip:
    """One row of the plan: `start` counts frames of the grid of `fps` from the video's first frame."""

    row: int
    source: int
    start: int
    key: str
    fps: Fraction


@dataclass
class Plan:
    """Rows (source number, first frame) in their final order, and everything needed to turn them into shards.

    `root` is where the sources' names lead, `created` when the plan was frozen; neither is part of the digest.
    """

    parameters: BuildParameters
    sources: list[Source]
    rows: npt.NDArray[np.int64]
    tools: dict[str, str]
    created: str
    root: str
    digest: str = field(default="")

    def __post_init__(self) -> None:
        found = self._content_digest()
        if self.digest and self.digest != found:
            raise DataError(f"plan.jsonl is damaged: its rows have digest {found[:12]}, it says {self.digest[:12]}")
        self.digest = found

    @property
    def classes(self) -> list[str] | None:
        """Sorted class names of all usable videos; None when nothing is labelled."""
        names = {s.class_name for s in self.sources if s.refused is None and s.class_name is not None}
        return sorted(names) or None

    @property
    def num_shards(self) -> int:
        """Shards that the rows make."""
        return -(-len(self.rows) // self.parameters.samples_per_shard)

    def clips(self, shard: int) -> list[Clip]:
        """The rows of one shard."""
        size = self.parameters.samples_per_shard
        low = shard * size
        return [self.clip(row) for row in range(low, min(low + size, len(self.rows)))]

    def clip(self, row: int) -> Clip:
        """One row with its key and frame rate."""
        number, start = map(int, self.rows[row])
        facts = self.sources[number].facts
        assert facts is not None
        fps = clip_rate(facts, self.parameters)
        span = [start, start + self.parameters.num_frames]
        return Clip(
            row, number, start, sample_key(facts.sha256, span, self.parameters.sample_parameters(str(fps))), fps
        )

    def _content_digest(self) -> str:
        """Digest over content and parameters: neither places nor times of files are in it."""
        videos = [
            [shown_name(s.name), s.facts and s.facts.sha256, s.class_name, s.caption, s.refused] for s in self.sources
        ]
        rows = hashlib.sha256(np.ascontiguousarray(self.rows, "<i8").tobytes()).hexdigest()
        return canonical_digest([FORMAT, VERSION, self.parameters.model_dump(mode="json"), videos, rows, self.tools])

    def dump(self, sources: bytes) -> bytes:
        """``plan.jsonl``: a sealed header line, then one line per row; `sources` is the ``sources.jsonl`` it is for."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "plan": self.digest,
            "sources_sha256": hashlib.sha256(sources).hexdigest(),
            "created": self.created,
            "root": self.root,
            "parameters": self.parameters.model_dump(mode="json"),
            "tools": self.tools,
            "rows": len(self.rows),
            "shards": self.num_shards,
            "classes": self.classes,
        }
        lines = [f'{{"source":{source},"start":{start}}}\n' for source, start in self.rows.tolist()]
        return seal(header) + b"\n" + "".join(lines).encode()

    @classmethod
    def load(cls, data: bytes, sources: bytes) -> Plan:
        """Read ``plan.jsonl`` with its ``sources.jsonl``; raises `DataError` unless both are what was frozen."""
        first, _, rest = data.partition(b"\n")
        header = unseal(first, "plan.jsonl")
        if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
            raise DataError(f"plan.jsonl has version {header.get('version')}; this program reads version {VERSION}")
        if hashlib.sha256(sources).hexdigest() != header["sources_sha256"]:
            raise DataError("sources.jsonl is damaged: it is not the one that plan.jsonl was made of")
        try:
            rows = [(row["source"], row["start"]) for row in map(json.loads, rest.decode().splitlines())]
            table = np.array(rows, np.int64).reshape(-1, 2)
            parameters = BuildParameters.model_validate(header["parameters"])
            head = {name: header[name] for name in ("tools", "created", "root")}
            plan = cls(parameters, parse_sources(sources), table, **head, digest=header["plan"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"plan.jsonl is damaged: {error}") from None
        if plan.dump(sources) != data:
            raise DataError("plan.jsonl is damaged: it does not read back to the same bytes")
        return plan


def clip_rate(facts: VideoFacts, parameters: BuildParameters) -> Fraction:
    """Frames per second of a video's clips."""
    return Fraction(parameters.fps) if parameters.fps is not None else Fraction(facts.rate)


def make_plan(
    sources: Sequence[Source], parameters: BuildParameters, *, tools: dict[str, str], created: str, root: str
) -> Plan:
    """Cut every usable video into clips. Too short ones are refused here.

    Videos are ordered by a hash of their content, so that classes and scenes mix over the shards, and the clips of
    one video stay together, so that it is decoded once.
    """
    judged: list[Source] = []
    rows: list[tuple[str, int, int]] = []
    used = 0
    for number, source in enumerate(drop_duplicates(sources)):
        if source.facts is not None and source.refused is None:
            facts = source.facts
            if parameters.limit_videos is not None and used >= parameters.limit_videos:
                source = Source(source.name, source.size, source.version)
            else:
                try:
                    rows += [(facts.sha256, number, start) for start in _starts(facts, parameters)]
                    used += 1
                except Refusal as refusal:
                    source = source.refusal(refusal, "plan")
        judged.append(source)
    rows.sort()
    chosen = rows[: parameters.limit_clips]
    table = np.array([(number, start) for _, number, start in chosen], np.int64).reshape(-1, 2)
    return Plan(parameters, judged, table, tools, created, root)


def _starts(facts: VideoFacts, parameters: BuildParameters) -> list[int]:
    length = facts.timeline().grid_length(clip_rate(facts, parameters))
    starts = clip_starts(
        length, parameters.num_frames, parameters.stride, parameters.portion, parameters.max_clips_per_video
    )
    if not starts:
        low, high = parameters.portion
        part = f" in the portion {low:g}:{high:g}" if (low, high) != (0, 1) else ""
        raise Refusal(Reason.TOO_SHORT, f"{length} frames{part} hold no clip of {parameters.num_frames}")
    return starts


def source_lines(sources: Iterable[Source]) -> bytes:
    """``sources.jsonl``."""
    return "".join(source.line() + "\n" for source in sources).encode()


def parse_sources(data: bytes) -> list[Source]:
    """The inverse of `source_lines`."""
    return [Source.parse(line) for line in data.decode().splitlines()]


def jobs_of(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Consecutive clips of the same video."""
    job: list[Clip] = []
    for clip in clips:
        if job and clip.source != job[0].source:
            yield job
            job = []
        job.append(clip)
    if job:
        yield job
