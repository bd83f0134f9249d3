"""The frozen plan: which clip of which video goes into which shard, fixed before the first frame is decoded.

``plan.json`` is a small sealed header, and the rows lie shard by shard in one object ``plan/<digest>.jsonl``: any
worker opens a plan of any size by reading the header, and then reads only the bytes of the shards that it leases, each
range checked against digests that the plan's own digest is made of. `freeze` owns it and writes it once (collected by
`draft`, written by `plan_writer`); workers, finalize, verify, gc and inspect open it with `load_plan`.

The rows, in order: for up to `PAGE` shards, each shard's videos (a line each: what they are and which clips are
theirs) and one line of their places (sizes and versions); then a page, two lines with size and sha256 of each of these
shards' videos, and of their places; so on; at last the quarantine lines of what was refused, and a line of the class
names. Places differ between two copies of the same videos, so they are guarded like the rest, but are no part of the
plan's digest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ardist.data.sample import sample_key
from ardist.errors import ArdistError, DataError
from ardist.storage import MissingObjectError, Storage
from data_tools import layout
from data_tools.parameters import BuildParameters
from data_tools.plan_header import PAGE, Header, Piece, another_version
from data_tools.probe import VideoFacts


@dataclass(frozen=True)
class Video:
    """One video of a shard, with everything that it takes to decode and label its clips."""

    name: str
    size: int
    version: str
    facts: VideoFacts
    class_id: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Clip:
    """One row of the plan: `start` counts frames of the grid of `fps` from the video's first frame."""

    row: int
    video: Video
    start: int
    key: str
    fps: Fraction


@dataclass
class Plan:
    """An opened plan: its header, and the rows of any shard on request. Holds no row itself."""

    header: Header
    digest: str
    _out: Storage
    _page: tuple[int, list[tuple[int, Piece, Piece]]] = field(default=(-1, []))

    @property
    def parameters(self) -> BuildParameters:
        """What is built."""
        return self.header.parameters

    @property
    def num_shards(self) -> int:
        """Shards that the rows make."""
        return self.header.num_shards

    def clips(self, shard: int) -> list[Clip]:
        """The rows of one shard, of `num_shards`; raises `DataError`, naming it, unless they are what was frozen."""
        at, videos, places = self._shards(shard // PAGE)[shard % PAGE]
        lines, last = self._read(f"the rows of shard {shard}", at, videos, places)
        clips: list[Clip] = []
        row = shard * self.parameters.samples_per_shard
        for line, (size, version) in zip(lines.split(b"\n")[:-1], json.loads(last), strict=True):
            fields = json.loads(line)
            facts = VideoFacts.from_json(fields["facts"])
            video = Video(fields["name"], size, version, facts, fields["class"], fields["caption"])
            fps = clip_rate(facts, self.parameters)
            made = self.parameters.sample_parameters(str(fps))
            for start in fields["starts"]:
                key = sample_key(facts.sha256, [start, start + self.parameters.num_frames], made)
                clips.append(Clip(row + len(clips), video, start, key, fps))
        return clips

    def classes(self) -> list[str] | None:
        """Sorted class names of all usable videos; None when nothing is labelled."""
        at = self._after_pages() + self.header.refused.size
        names: list[str] = json.loads(self._read("the class names", at, self.header.classes)[0])
        return names or None

    def stream_refused(self, take: Callable[[bytes], object]) -> None:
        """Hand the quarantine lines of refused videos to `take`, piece by piece.

        Raises `DataError` when they are not what was frozen; only then is it known, so `take` must not act on them.
        """
        what, found = "the refused videos", hashlib.sha256()

        def took(piece: bytes) -> None:
            found.update(piece)
            take(piece)

        at, expected = self._after_pages(), self.header.refused
        try:
            count = self._out.stream(self.header.rows_name, took, at, expected.size)
        except MissingObjectError:
            raise self._missing() from None
        self._check(what, at, count, expected, found.hexdigest())

    def damage(self) -> Iterator[ArdistError]:
        """Everything in the rows that is not what was frozen or cannot be read: reads them all, a shard at a time."""
        checks: list[Callable[[], object]] = [self._check_size, self.classes]
        checks.append(lambda: self.stream_refused(lambda piece: None))
        for number in range(len(self.header.pages)):
            try:
                shards = self._shards(number)
            except ArdistError as error:
                yield error
                continue
            for position, (at, videos, places) in enumerate(shards):
                try:
                    self._read(f"the rows of shard {number * PAGE + position}", at, videos, places)
                except ArdistError as error:
                    yield error
        for check in checks:
            try:
                check()
            except ArdistError as error:
                yield error

    def _check_size(self) -> None:
        try:
            found = self._out.size(self.header.rows_name)
        except MissingObjectError:
            raise self._missing() from None
        if found != self.header.rows_bytes:
            raise DataError(f"{self._where} has {found} bytes, {layout.PLAN} says {self.header.rows_bytes}")

    def _shards(self, number: int) -> list[tuple[int, Piece, Piece]]:
        """Of a page's shards: where they begin, their videos and their places."""
        if self._page[0] != number:
            page = self.header.pages[number]
            low, high = number * PAGE, min((number + 1) * PAGE, self.num_shards) - 1
            read = self._read(f"the digests of shards {low} to {high}", page.at, page.videos, page.places)
            videos, places = ([Piece.parse(item) for item in json.loads(line)] for line in read)
            sizes = [one.size + other.size for one, other in zip(videos, places, strict=True)]
            starts = itertools.accumulate(sizes, initial=page.first)
            self._page = (number, list(zip(starts, videos, places, strict=False)))
        return self._page[1]

    def _after_pages(self) -> int:
        """Where what follows the last page begins."""
        if not self.header.pages:
            return 0
        last = self.header.pages[-1]
        return last.at + last.videos.size + last.places.size

    def _read(self, what: str, at: int, *pieces: Piece) -> list[bytes]:
        """Pieces that follow one another, each checked."""
        try:
            data = self._out.read(self.header.rows_name, at, sum(piece.size for piece in pieces))
        except MissingObjectError:
            raise self._missing() from None
        found = []
        for piece in pieces:
            part, data = data[: piece.size], data[piece.size :]
            self._check(what, at, len(part), piece, hashlib.sha256(part).hexdigest())
            at += piece.size
            found.append(part)
        return found

    def _check(self, what: str, at: int, count: int, piece: Piece, sha256: str) -> None:
        if count != piece.size:
            raise DataError(
                f"{self._where} is cut: {what} take {piece.size} bytes from byte {at}, of which {count} are there"
            )
        if sha256 != piece.sha256:
            raise DataError(
                f"{self._where} is damaged: {what}, {piece.size} bytes from byte {at}, have digest {sha256[:12]}, "
                f"the plan says {piece.sha256[:12]}"
            )

    @property
    def _where(self) -> str:
        return f"{self._out.url}/{self.header.rows_name}"

    def _missing(self) -> DataError:
        return DataError(f"{self._where} is missing: without its rows the plan cannot be built or checked")


def load_plan(out: Storage) -> Plan | None:
    """Open the frozen plan of an output, or None before there is one: reads the header alone."""
    try:
        data = out.read(layout.PLAN)
    except MissingObjectError:
        if out.exists(layout.OLD_PLAN):
            raise another_version(f"{out.url}/{layout.OLD_PLAN}", 1) from None
        return None
    header = Header.parse(data, f"{out.url}/{layout.PLAN}")
    return Plan(header, header.digest(), out)


def clip_rate(facts: VideoFacts, parameters: BuildParameters) -> Fraction:
    """Frames per second of a video's clips."""
    return Fraction(parameters.fps) if parameters.fps is not None else Fraction(facts.rate)


def jobs_of(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Consecutive clips of the same video."""
    for _, group in itertools.groupby(clips, key=lambda clip: id(clip.video)):
        yield list(group)
