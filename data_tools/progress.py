"""What a build shows while it runs: bars on a terminal, lines in a log, a table at the end."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ardist.events import events

if TYPE_CHECKING:
    from data_tools.build import Summary
    from data_tools.shard import Counts

_log = logging.getLogger("data_tools.progress")


class Progress(Protocol):
    """What a build reports; methods may be called from any thread."""

    def probed(self, done: int, total: int) -> None:
        """`done` of `total` listed files have been looked at."""

    def planned(self, shards: int, clips: int, committed: int) -> None:
        """The plan is frozen; `committed` of its shards stand already."""

    def advanced(self, shard: int, counts: Counts) -> None:
        """State of a shard that is being built here."""

    def committed(self, shard: int, counts: Counts) -> None:
        """A shard is committed."""

    def finished(self, summary: Summary) -> None:
        """The dataset is complete."""


class SilentProgress:
    """Shows nothing."""

    def probed(self, done: int, total: int) -> None: ...
    def planned(self, shards: int, clips: int, committed: int) -> None: ...
    def advanced(self, shard: int, counts: Counts) -> None: ...
    def committed(self, shard: int, counts: Counts) -> None: ...
    def finished(self, summary: Summary) -> None: ...


class ConsoleProgress:
    """Bars (or, where there is no terminal, a line now and then), a JSONL log and the final table."""

    def __init__(self, console: Console, log: Path | None = None, every: float = 10.0, bars: bool = True) -> None:
        self._console, self._every = console, every
        self._has_bars = bars and console.is_terminal
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._has_bars,
        )
        self._tasks: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._done: dict[int, tuple[int, int, int]] = {}
        self._fill, self._probed = 0.0, 0
        self._begun = self._spoke = time.monotonic()
        self._total_clips = 0
        self._log = log
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if error is not None and self._file is not None:
            self._write("failed", error=f"{type(error).__name__}: {error}")
        if self._file is not None:
            self._file.close()

    def probed(self, done: int, total: int) -> None:
        with self._lock:
            self._bar("probing", done, total, "")
            self._probed = total

    def planned(self, shards: int, clips: int, committed: int) -> None:
        with self._lock:
            self._total_clips = clips
            self._begun = time.monotonic()
            self._bar("shards", committed, shards, "")
            if self._probed:
                self._write("probed", videos=self._probed)
            self._write("planned", shards=shards, clips=clips, committed=committed)

    def advanced(self, shard: int, counts: Counts) -> None:
        with self._lock:
            self._done[shard] = (counts.clips, counts.refused, counts.frames)
            self._fill = counts.queue_fill
            clips, refused, frames = (sum(column) for column in zip(*self._done.values(), strict=True))
            now = time.monotonic()
            seconds = max(1e-6, now - self._begun)
            note = (
                f"{clips / seconds:.1f} clips/s · {frames / seconds:.0f} frames/s · "
                f"queue {self._fill:.0%} · {refused} quarantined"
            )
            self._bar("clips", clips + refused, self._total_clips, note)
            if now - self._spoke >= self._every:
                self._spoke = now
                self._write("progress", clips=clips, refused=refused, frames=frames, seconds=round(seconds, 3))
                if not self._has_bars:
                    _log.info("%d of %d clips · %s", clips + refused, self._total_clips, note)

    def committed(self, shard: int, counts: Counts) -> None:
        with self._lock:
            self._done[shard] = (counts.clips, counts.refused, counts.frames)
            if "shards" in self._tasks:
                self._bars.advance(self._tasks["shards"])
            self._write("committed", shard=shard, clips=counts.clips, refused=counts.refused, frames=counts.frames)

    def finished(self, summary: Summary) -> None:
        manifest = summary.manifest
        self._write(
            "finished",
            digest=manifest.digest(),
            samples=manifest.num_samples,
            refused_videos=summary.refused_videos,
            refused_clips=summary.refused_clips,
            seconds=round(summary.seconds, 3),
            reused=summary.reused,
            events=summary.events,
        )
        self._bars.stop()
        self._console.print(summary_table(summary))

    def _bar(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, note=note)
        self._bars.update(self._tasks[name], completed=done, total=total, note=note)

    def _write(self, event: str, **fields: object) -> None:
        try:
            if self._file is None and self._log is not None:
                # Opened with the first line, so that a refused command leaves nothing behind.
                self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._file = self._log.open("ab", buffering=0)
            if self._file is not None:
                line = {"time": round(time.time(), 3), "event": event, **fields}
                self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            # A full disk costs the log, not the build.
            events.count("build.log_line_lost", log=self._log, reason=error.strerror or error)


def summary_table(summary: Summary) -> Table:
    """The last words of a build."""
    manifest = summary.manifest
    title = "already finished" if summary.reused else f"built in {summary.seconds:.1f} s"
    table = Table(title=f"{summary.url}: {title}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "samples": f"{manifest.num_samples} {manifest.kind} {manifest.dtype} {list(manifest.shape)}",
        "shards": f"{len(manifest.shards)} ({manifest.num_bytes / 2**20:.1f} MiB)",
        "videos": f"{summary.videos} found, {summary.refused_videos} refused, {summary.duplicates} duplicates",
        "clips": f"{summary.clips_planned} planned, {summary.refused_clips} refused",
        "refused": summary.reasons,
        "manifest": manifest.digest(),
    }
    if manifest.classes is not None:
        rows["classes"] = str(len(manifest.classes))
    for name, count in summary.events.items():
        rows[name] = str(count)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
