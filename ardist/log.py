"""Logging: one line format, aware of the rank, to the console and to a file of the run directory."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True)


class _LineFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)sZ rank%(rank)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.rank = os.environ.get("RANK") or "0"
        return super().format(record)


def configure(run_dir: Path | None = None, level: int | str = logging.INFO) -> None:
    """Send our log to the console (rank 0; other ranks: warnings) and to ``<run_dir>/logs/rank-N.log``."""
    rank = int(os.environ.get("RANK") or 0)
    for name in ("ardist", "data_tools"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.addHandler(_console_handler(logging.WARNING if rank else level))
        if run_dir is not None:
            directory = run_dir / "logs"
            directory.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(
                directory / f"rank-{rank:05d}.log", encoding="utf-8", errors="backslashreplace"
            )
            handler.setFormatter(_LineFormatter())
            logger.addHandler(handler)


def _console_handler(level: int | str) -> logging.Handler:
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S", markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_LineFormatter())
    handler.setLevel(level)
    return handler
