"""The clock of a benchmark: seconds on the wall, or of the processor on a machine that others use at the same time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable


def add_clock(parser: argparse.ArgumentParser) -> None:
    """The option --clock."""
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds of this process, for a machine that others use at the same time",
    )


def chosen_clock(options: argparse.Namespace) -> Callable[[], float]:
    """The function that --clock asks for; differences of its values are seconds."""
    return time.process_time if options.clock == "cpu" else time.perf_counter
