"""Writing the rows of a plan: one pass in plan order, of which a shard at a time is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from data_tools import layout
from data_tools.plan_header import PAGE, Page, Piece


class RowsWriter:
    """Takes videos in plan order and cuts their clips into shards of `samples_per_shard`.

    After `finish`: `pages`, `refused` and `classes` lead into the file, `name` is what its content makes it.
    """

    def __init__(self, file: BinaryIO, samples_per_shard: int) -> None:
        self._file, self._per_shard = file, samples_per_shard
        self._digest = hashlib.sha256()
        self._videos: list[bytes] = []
        self._places: list[Sequence[object]] = []
        self._in_shard = 0
        self._shards: list[tuple[Piece, Piece]] = []
        self._first = 0
        self.num_clips = 0
        self.num_bytes = 0
        self.pages: list[Page] = []
        self.refused = self.classes = Piece.of(b"")

    @property
    def name(self) -> str:
        """What the rows are called in the output."""
        return layout.rows_name(self._digest.hexdigest())

    def add(self, video: Mapping[str, Any], place: Sequence[object], starts: Sequence[int]) -> None:
        """The next video (name, facts, class, caption), its place (size, version) and its clips, at least one."""
        while starts:
            here, starts = starts[: self._per_shard - self._in_shard], starts[self._per_shard - self._in_shard :]
            self._videos.append(_line({**video, "starts": here}))
            self._places.append(place)
            self._in_shard += len(here)
            self.num_clips += len(here)
            if self._in_shard == self._per_shard:
                self._end_shard()

    def finish(self, refused: Iterable[bytes], classes: Sequence[str]) -> None:
        """End the last shard and page, then write the quarantine lines of refused videos and the class names."""
        if self._in_shard:
            self._end_shard()
        if self._shards:
            self._end_page()
        begun, digest = self.num_bytes, hashlib.sha256()
        for line in refused:
            digest.update(line)
            self._write(line)
        self.refused = Piece(self.num_bytes - begun, digest.hexdigest())
        self.classes = self._write(_line(classes))

    def _end_shard(self) -> None:
        self._shards.append((self._write(b"".join(self._videos)), self._write(_line(self._places))))
        self._videos, self._places, self._in_shard = [], [], 0
        if len(self._shards) == PAGE:
            self._end_page()

    def _end_page(self) -> None:
        at = self.num_bytes
        videos = self._write(_line([videos.as_json() for videos, _ in self._shards]))
        places = self._write(_line([places.as_json() for _, places in self._shards]))
        self.pages.append(Page(self._first, at, videos, places))
        self._first, self._shards = self.num_bytes, []

    def _write(self, data: bytes) -> Piece:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
        return Piece.of(data)


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
