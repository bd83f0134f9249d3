"""Judging probed videos in the order of the listing, and giving them out in the order of the plan, through a file.

Videos are ordered by a hash of their content, so that classes and scenes mix over the shards, and the clips of one
video stay together, so that it is decoded once. A scratch database holds them meanwhile: memory does not grow with
their number. `freeze` makes one, fills it and throws it away.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_tools.fetch import DENIED_IN_A_ROW
from data_tools.parameters import BuildParameters
from data_tools.plan import clip_rate
from data_tools.plan_writer import RowsWriter
from data_tools.probe import VideoFacts
from data_tools.probed import Source, shown_name
from data_tools.reasons import Reason, Refusal, quarantine_line
from data_tools.timing import clip_starts

READABLE = DENIED_IN_A_ROW + 1
"""Names of probed videos that the header keeps, for a worker that is denied the first object that it asks for."""

_CACHE_KIB = 32 * 1024


class Draft:
    """Collects sources; `folder` is private and empty. To be closed."""

    def __init__(self, folder: Path, parameters: BuildParameters) -> None:
        self._parameters = parameters
        # Nobody else opens it and a crash throws it away: neither locks nor a journal.
        self._base = sqlite3.connect(f"{(folder / 'draft').as_uri()}?nolock=1", uri=True, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{_CACHE_KIB}"):
            self._base.execute(f"PRAGMA {setting}")
        # Never committed: what fits in the cache never touches the disk.
        self._base.execute("BEGIN")
        self._base.execute("CREATE TABLE videos (content BLOB PRIMARY KEY, shown TEXT, source TEXT)")
        self._base.execute("CREATE TABLE refused (line BLOB)")
        self._used = 0
        self._classes: set[str] = set()
        self.num_videos = 0
        self.readable: list[str] = []
        self.reasons: Counter[str] = Counter()

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def add(self, source: Source) -> None:
        """The next source of the listing. Refused are copies of earlier ones and what is too short for a clip."""
        self.num_videos += 1
        record = source.refused
        if source.facts is not None:
            if len(self.readable) < READABLE:
                self.readable.append(source.name)
            if record is None:
                try:
                    self._use(source, source.facts)
                except Refusal as refusal:
                    record = refusal.record(shown_name(source.name), "plan")
        if record is not None:
            self.reasons[str(record["reason"])] += 1
            self._base.execute("INSERT INTO refused VALUES (?)", (quarantine_line(record),))

    def write(self, writer: RowsWriter) -> None:
        """All usable videos in plan order, and what is refused in the order of the listing."""
        classes = sorted(self._classes)
        numbers = {name: number for number, name in enumerate(classes)}
        room = self._parameters.limit_clips
        for (line,) in self._base.execute("SELECT source FROM videos WHERE source NOT NULL ORDER BY content"):
            source = Source.parse(line)
            assert source.facts is not None
            starts = self._starts(source.facts)
            if room is not None:
                starts = starts[: room - writer.num_clips]
            video = {
                "name": source.name,
                "facts": source.facts.as_json(),
                "class": None if source.class_name is None else numbers[source.class_name],
                "caption": source.caption,
            }
            writer.add(video, (source.size, source.version), starts)
            if writer.num_clips == room:
                break
        writer.finish(self._refused(), classes)

    def _refused(self) -> Iterator[bytes]:
        return (line for (line,) in self._base.execute("SELECT line FROM refused ORDER BY rowid"))

    def _use(self, source: Source, facts: VideoFacts) -> None:
        content, shown = bytes.fromhex(facts.sha256), shown_name(source.name)
        known = self._base.execute("SELECT shown FROM videos WHERE content = ?", (content,)).fetchone()
        if known is not None:
            raise Refusal(Reason.DUPLICATE, f"same content as {known[0]}")
        limit = self._parameters.limit_videos
        wanted = limit is None or self._used < limit
        usable = wanted and bool(self._starts(facts))
        row = (content, shown, source.line() if usable else None)
        self._base.execute("INSERT INTO videos VALUES (?, ?, ?)", row)
        if usable:
            self._used += 1
            if source.class_name is not None:
                self._classes.add(source.class_name)
        elif wanted:
            self._refuse_short(facts)

    def _starts(self, facts: VideoFacts) -> list[int]:
        parameters = self._parameters
        return clip_starts(
            self._length(facts),
            parameters.num_frames,
            parameters.stride,
            parameters.portion,
            parameters.max_clips_per_video,
        )

    def _length(self, facts: VideoFacts) -> int:
        return facts.timeline().grid_length(clip_rate(facts, self._parameters))

    def _refuse_short(self, facts: VideoFacts) -> None:
        low, high = self._parameters.portion
        part = f" in the portion {low:g}:{high:g}" if (low, high) != (0, 1) else ""
        frames = f"{self._length(facts)} frames{part}"
        raise Refusal(Reason.TOO_SHORT, f"{frames} hold no clip of {self._parameters.num_frames}")
