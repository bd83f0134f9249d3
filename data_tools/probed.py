"""What is known about the candidates once they were looked at: the lines of ``probes/``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_tools.probe import VideoFacts
from data_tools.reasons import Refusal


@dataclass(frozen=True, slots=True)
class Source:
    """One candidate after probing: facts, or why it is refused. A line of ``probes/``."""

    name: str
    size: int
    version: str
    facts: VideoFacts | None = None
    class_name: str | None = None
    caption: str | None = None
    refused: dict[str, object] | None = None

    def line(self) -> str:
        """Its line of ``probes/``."""
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


def source_lines(sources: Iterable[Source]) -> bytes:
    """One object of ``probes/``."""
    return "".join(source.line() + "\n" for source in sources).encode()


def parse_sources(data: bytes) -> list[Source]:
    """The inverse of `source_lines`."""
    return [Source.parse(line) for line in data.decode().split("\n")[:-1]]
