"""The header of a frozen plan: ``plan.json``, small, sealed, and bound to the plan's digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ardist.config.base import canonical_digest
from ardist.errors import DataError
from data_tools.parameters import BuildParameters
from data_tools.reasons import Reason
from data_tools.sealed import seal, unseal

FORMAT, VERSION = "ardist-plan", 2

PAGE = 1024
"""Shards whose digests make one page."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of the rows."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> Piece:
        """The piece that holds `data`."""
        return cls(len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def parse(cls, fields: Sequence[Any]) -> Piece:
        """The inverse of `as_json`."""
        size, sha256 = fields
        return cls(int(size), str(sha256))

    def as_json(self) -> list[object]:
        """Plain values."""
        return [self.size, self.sha256]


@dataclass(frozen=True, slots=True)
class Page:
    """Where the shards of a page begin, where the page itself does, and its two lines."""

    first: int
    at: int
    videos: Piece
    places: Piece


@dataclass(frozen=True)
class Header:
    """``plan.json``: everything about a plan but its rows. Of these it grows only by a page for every 1,024 shards.

    `root` is where the videos' names lead, `created` when the plan was frozen, `readable` a few names that could be
    read once; like the places in the rows, none of them is part of the digest.
    """

    parameters: BuildParameters
    tools: dict[str, str]
    created: str
    root: str
    num_clips: int
    num_videos: int
    reasons: dict[str, int]
    readable: tuple[str, ...]
    rows_name: str
    rows_bytes: int
    pages: tuple[Page, ...]
    refused: Piece
    classes: Piece

    @property
    def num_shards(self) -> int:
        """Shards that the rows make."""
        return -(-self.num_clips // self.parameters.samples_per_shard)

    @property
    def num_duplicates(self) -> int:
        """Videos that are refused because their content stands earlier in the listing."""
        return sum(count for reason, count in self.reasons.items() if not Reason(reason).is_bad)

    @property
    def num_bad(self) -> int:
        """Videos that are refused for what they are."""
        return sum(self.reasons.values()) - self.num_duplicates

    def digest(self) -> str:
        """Digest over content and parameters: neither places nor times of files are in it."""
        content = {
            "format": [FORMAT, VERSION],
            "parameters": self.parameters.model_dump(mode="json"),
            "tools": self.tools,
            "counts": [self.num_clips, self.num_videos],
            "reasons": self.reasons,
            "pages": [page.videos.as_json() for page in self.pages],
            "refused": self.refused.as_json(),
            "classes": self.classes.as_json(),
        }
        return canonical_digest(content)

    def dump(self) -> bytes:
        """``plan.json``."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "plan": self.digest(),
            "created": self.created,
            "root": self.root,
            "parameters": self.parameters.model_dump(mode="json"),
            "tools": self.tools,
            "clips": self.num_clips,
            "shards": self.num_shards,
            "videos": self.num_videos,
            "reasons": self.reasons,
            "readable": list(self.readable),
            "rows": self.rows_name,
            "bytes": self.rows_bytes,
            "pages": [[page.first, page.at, page.videos.as_json(), page.places.as_json()] for page in self.pages],
            "refused": self.refused.as_json(),
            "classes": self.classes.as_json(),
        }
        return seal(fields)

    @classmethod
    def parse(cls, data: bytes, source: str) -> Header:
        """The inverse of `dump`; raises `DataError`, naming `source`, unless it is what was frozen."""
        fields = unseal(data, source)
        if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
            raise another_version(source, fields.get("version"))
        try:
            header = cls(
                parameters=BuildParameters.model_validate(fields["parameters"]),
                num_clips=fields["clips"],
                num_videos=fields["videos"],
                readable=tuple(fields["readable"]),
                rows_name=fields["rows"],
                rows_bytes=fields["bytes"],
                pages=tuple(Page(first, at, Piece.parse(v), Piece.parse(p)) for first, at, v, p in fields["pages"]),
                refused=Piece.parse(fields["refused"]),
                classes=Piece.parse(fields["classes"]),
                **{name: fields[name] for name in ("tools", "created", "root", "reasons")},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{source} is damaged: {error}") from None
        if header.digest() != fields.get("plan"):
            raise DataError(f"{source} is damaged: it describes plan {header.digest()[:12]} and names another")
        return header


def another_version(source: str, version: object) -> DataError:
    """The error for a plan that another release froze."""
    return DataError(
        f"{source} is a plan of version {version}, this program reads version {VERSION}: go on with the release that "
        "froze it, or build into another --out; a finished dataset can be trained on as it is"
    )
