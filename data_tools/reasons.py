"""Why a video or a clip was refused: one short code each, the same in quarantine.jsonl, counters and messages."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping

MAX_DETAIL = 500
"""Characters of a detail that are kept."""


class Reason(enum.StrEnum):
    """Reason codes of quarantine.jsonl; a name never changes its meaning."""

    VANISHED = "vanished"  # listed, but no longer there
    CHANGED = "changed"  # size, time, version or bytes differ from the listing or the probe
    UNREADABLE = "unreadable"  # permission or I/O error; archived
    NOT_A_FILE = "not_a_file"  # FIFO, device, socket, directory with a video's name
    EMPTY = "empty"  # zero bytes
    FORMAT = "format"  # not a container we allow
    NO_VIDEO = "no_video"  # no moving-picture stream: audio only, cover art
    CODEC = "codec"  # no decoder for the stream
    ENCRYPTED = "encrypted"  # protected content
    DAMAGED = "damaged"  # cannot be decoded where a clip needs it
    TIMESTAMPS = "timestamps"  # no usable frame times
    TOO_SHORT = "too_short"  # fewer frames than one clip
    TOO_LONG = "too_long"  # above the cap on duration or packets
    TOO_LARGE = "too_large"  # above the cap on pixels or bytes
    ASPECT = "aspect"  # too far from square to crop from
    TIMEOUT = "timeout"  # the child did not finish in time and was killed
    CRASHED = "crashed"  # the child died or exceeded memory or CPU time
    DUPLICATE = "duplicate"  # the same content stands earlier in the listing
    LABEL = "label"  # no or contradictory label where labels were asked for
    CAPTION = "caption"  # caption too long or not text
    NONFINITE = "nonfinite"  # the encoder gave NaN or infinity
    MEMORY = "memory"  # the encoder ran out of memory with a single clip

    @property
    def is_bad(self) -> bool:
        """Whether it counts against ``--max-bad``: a second copy of a good video does not."""
        return self is not Reason.DUPLICATE


class Refusal(Exception):
    """A video or clip is refused; `detail` is for people, at most 500 characters are kept of it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def record(self, source: str, stage: str, **where: object) -> dict[str, object]:
        """The line of quarantine.jsonl."""
        detail = " ".join(self.detail.split())
        if len(detail) > MAX_DETAIL:
            detail = detail[: MAX_DETAIL - 1] + "…"
        return {"source": source, "stage": stage, "reason": str(self.reason), "detail": detail, **where}


def quarantine_line(record: Mapping[str, object]) -> bytes:
    """A record as a line of ``quarantine.jsonl``."""
    return json.dumps(dict(record), ensure_ascii=False).encode() + b"\n"
