"""Builders that die: the points where they may, and three of them at once."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from ardist import fault

# Every point of the builder itself, in order of the first visit; the tests keep the list complete.
BUILD_POINTS = [
    "build.after_claim",
    "build.after_listing",
    "build.before_lease",
    "build.after_lease",
    "build.before_probes",
    "build.draft",
    "build.before_rows",
    "build.before_plan",
    "build.after_plan",
    "build.shard_started",
    "build.sample",
    "build.shard_written",
    "build.before_upload_0",
    "build.before_upload_1",
    "build.after_upload",
    "build.before_commit",
    "build.after_commit",
    "build.before_finalize",
    "build.after_quarantine",
    "build.before_manifest",
    "build.after_manifest",
]
assert len(BUILD_POINTS) >= 20


def run_forked(function: Callable[[], Any], planned: str = "") -> int:
    """Start a function in a forked child with a fault planned; returns its process number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ[fault.VARIABLE] = planned
            fault._visits.clear()
            function()
            status = 0
        except BaseException as error:  # noqa: BLE001 - the child must not run the parent's tests
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    return child


def builders(function: Callable[[], Any], count: int = 3) -> list[Callable[[], Any]]:
    """The same build in several processes."""
    return [functools.partial(function)] * count


def run_builders(functions: list[Callable[[], Any]], planned: str = "") -> list[int]:
    """Exit statuses of builders that run at once, each with the fault planned; -9: killed."""
    children = [run_forked(function, planned) for function in functions]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
