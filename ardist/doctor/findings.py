"""What an examination finds, and how it is shown."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table


class Level(enum.Enum):
    """How bad it is: training works, works with less, or cannot work."""

    GOOD = "green"
    WEAK = "yellow"
    BAD = "red"


@dataclass(frozen=True)
class Finding:
    """One line of the table; `advice` is empty for what is good."""

    subject: str
    level: Level
    detail: str
    advice: str = ""


def good(subject: str, detail: str) -> Finding:
    """All is well."""
    return Finding(subject, Level.GOOD, detail)


def weak(subject: str, detail: str, advice: str) -> Finding:
    """Training works, but something is missing."""
    return Finding(subject, Level.WEAK, detail, advice)


def bad(subject: str, detail: str, advice: str) -> Finding:
    """Training cannot work."""
    return Finding(subject, Level.BAD, detail, advice)


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row per finding; the mark says without colours what the colour says."""
    marks = {Level.GOOD: "ok", Level.WEAK: "note", Level.BAD: "FAIL"}
    table = Table()
    for name in ("", "subject", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        colour = finding.level.value
        mark = f"[{colour}]{marks[finding.level]}[/]"
        advice = f"[{colour}]{escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(mark, escape(finding.subject), escape(finding.detail), advice)
    return table
