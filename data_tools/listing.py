"""The frozen listing of the candidates: ``listing.jsonl``, written once and read a chunk at a time."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path

from ardist import fault
from ardist.errors import ConfigError, DataError
from ardist.storage import Storage
from data_tools import layout
from data_tools.claim import Claim, take
from data_tools.sources import Listed, SourceRoot, list_sources

CHUNK = 256
"""Listed files whose probe results make one object."""


def freeze_listing(out: Storage, claim: Claim) -> None:
    """List the candidates and write the listing, unless it, or the plan made of it, stands already.

    Raises `ConfigError` when there are no videos; then nothing was written.
    """
    if out.exists(layout.LISTING) or out.exists(layout.PLAN):
        return
    root, listed = list_sources(claim.videos, exclude=out.url)
    if not listed:
        raise ConfigError(
            f"no video found in {claim.videos}: looked for files named like videos (.mp4, .mkv, .webm, .avi, …)"
        )
    out.check_conditional_create()
    take(out, claim)
    fault.point("build.after_claim")
    text = bytearray(json.dumps({"root": root.address}).encode() + b"\n")
    for item in listed:
        text += item.line().encode() + b"\n"
    out.create(layout.LISTING, bytes(text))
    fault.point("build.after_listing")


@dataclass(frozen=True)
class Listing:
    """A local copy of the listing: where names lead, how many there are, and any chunk of them on request."""

    root: SourceRoot
    count: int
    path: Path
    _starts: array[int]

    @classmethod
    def read(cls, out: Storage, path: Path) -> Listing:
        """Copy the listing of an output to `path`; raises `MissingObjectError` where there is none."""
        out.download(layout.LISTING, path)
        starts, count = array("q"), 0
        with path.open("rb") as file:
            head = file.readline()
            while True:
                if count % CHUNK == 0:
                    starts.append(file.tell())
                if not file.readline():
                    break
                count += 1
        try:
            root = SourceRoot(json.loads(head)["root"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{out.url}/{layout.LISTING} is damaged: {error}") from None
        return cls(root, count, path, starts)

    @property
    def num_chunks(self) -> int:
        """Runs of `CHUNK` names, the last one shorter."""
        return -(-self.count // CHUNK)

    def chunk(self, number: int) -> list[Listed]:
        """The candidates of one chunk."""
        with self.path.open("rb") as file:
            file.seek(self._starts[number])
            lines = [file.readline() for _ in range(min(CHUNK, self.count - number * CHUNK))]
        return [Listed.parse(line.decode()) for line in lines]
