"""What failures cost a run: starts, causes, time to notice and to be back, lost steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ardist.report.html import Page
from ardist.training import goodput


def add_launches(run_dir: Path, totals: dict[str, Any] | None, page: Page) -> None:
    """Add the totals over all starts (``launches`` of ``summary.json``) and one row per failure.

    Adds nothing for a run that no supervisor started.
    """
    if totals is None:
        return
    page.heading("Starts and failures")
    page.table(("", ""), [(name, _shown(value)) for name, value in totals.items() if name != "by_cause"])
    causes = [(cause, *map(_shown, found.values())) for cause, found in totals["by_cause"].items()]
    if causes:
        page.table(("cause", "failures", "noticed after s", "next step after s", "lost steps"), causes)
    failures = goodput.restarts(goodput.read(run_dir))
    names = ("cause", "detail", "rank", "phase", "step", "detect_seconds", "restart_seconds", "lost_steps")
    if failures:
        page.table(names, [tuple(_shown(row[name]) for name in names) for row in failures])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
