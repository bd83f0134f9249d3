"""Runs named stages in order, remembers the finished ones, and redoes what an earlier change made stale."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ardist.config import canonical_digest
from ardist.errors import ArdistError, DataError
from ardist.log import console


class StageError(ArdistError):
    """A command of a stage ended with an exit code that was not expected; carries that code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Stage:
    """One stop of the road.

    `inputs` is everything that decides what the stage makes (arguments, settings); `outputs` must exist when it has
    ended. What an unfinished stage left is removed before it starts again, unless it `continues` by itself from
    what an interrupted attempt with the same inputs left.
    """

    name: str
    title: str
    inputs: Mapping[str, object]
    outputs: Sequence[Path]
    action: Callable[[], None]
    continues: bool = False


class StageRunner:
    """Keeps ``<directory>/stages.json``: which stage was begun with which inputs, and its seconds once finished."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "stages.json"
        self._chain = ""
        self._seconds: dict[str, float | None] = {}
        self._known: dict[str, dict[str, object]] = {}
        if self._path.exists():
            try:
                self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise DataError(f"{str(self._path)!r} is damaged ({error}); remove it, or use --fresh") from None

    def run(self, stage: Stage, position: str) -> None:
        """Run a stage unless it and all before it are finished with the same inputs."""
        self._chain = canonical_digest([self._chain, stage.name, dict(stage.inputs)])
        console.rule(f"[bold]{position} {stage.title}", align="left")
        if self._is_finished(stage):
            console.print("already finished, reused", style="dim")
            self._seconds[stage.title] = None
            return
        if not (stage.continues and self._record(stage).get("digest") == self._chain):
            _remove(stage.outputs)
        self._write(stage, None)
        started = time.monotonic()
        stage.action()
        seconds = time.monotonic() - started
        missing = [str(output) for output in stage.outputs if not output.exists()]
        if missing:
            raise StageError(f"the stage {stage.name!r} ended without writing {', '.join(missing)}", 1)
        self._seconds[stage.title] = seconds
        self._write(stage, round(seconds, 1))

    def _record(self, stage: Stage) -> dict[str, object]:
        return self._known.get(stage.name, {})

    def _is_finished(self, stage: Stage) -> bool:
        record = self._record(stage)
        made = all(output.exists() for output in stage.outputs)
        return made and record.get("digest") == self._chain and record.get("seconds") is not None

    def _write(self, stage: Stage, seconds: float | None) -> None:
        self._known[stage.name] = {"digest": self._chain, "seconds": seconds}
        temporary = self._path.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def table(self) -> Table:
        """The stages of this run and their times."""
        table = Table("stage", "seconds", title="quickstart", title_justify="left")
        for title, seconds in self._seconds.items():
            table.add_row(title, "reused" if seconds is None else f"{seconds:.0f}")
        table.add_row("total", f"{sum(filter(None, self._seconds.values())):.0f}", style="bold")
        return table


def _remove(outputs: Sequence[Path]) -> None:
    for output in outputs:
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)


def run_command(words: Sequence[str | Path], expected: int = 0) -> None:
    """Show a command and run it with this process's terminal; `StageError` unless it ends as expected."""
    line = [str(word) for word in words]
    console.print("$ " + shlex.join(line), style="cyan", highlight=False, markup=False, soft_wrap=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    code = subprocess.run(line, env=environment, check=False).returncode
    if code != expected:
        wanted = "" if expected == 0 else f", expected {expected}"
        raise StageError(
            f"{shlex.join(line[:3])} … ended with exit code {code}{wanted}; its own message stands above. "
            "What was finished is kept: the same command continues from here.",
            code if code > 0 else 1,
        )
