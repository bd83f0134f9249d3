"""Fault injection for the test suite: named points that do nothing unless ``ARDIST_FAULT`` is set.

``ARDIST_FAULT="kind@point[:arg][;…]"`` with kinds ``kill`` (SIGKILL to this process), ``stop`` (SIGSTOP),
``raise`` (OSError with errno `arg`, default EIO), ``exit`` (``os._exit(arg)``), ``sleep`` (`arg` seconds) and
``wait`` (until the file `arg` exists: what must come first comes first on any machine, however slow it is).
A point is named by the code that owns it, such as ``checkpoint.after_part``; append ``#n`` to fire at the n-th
visit only (1-based) and ``/r`` to fire on rank r only: ``kill@checkpoint.after_part/1#2``.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass

VARIABLE = "ARDIST_FAULT"
KINDS = ("kill", "stop", "raise", "exit", "sleep", "wait", "value")

_SYNTAX = re.compile(
    r"(?P<kind>[a-z]+)@(?P<point>[a-z0-9_.]+)(?:/(?P<rank>\d+))?(?:#(?P<visit>\d+))?(?::(?P<argument>.+))?$"
)
_visits: Counter[str] = Counter()


@dataclass(frozen=True)
class Fault:
    """One parsed fault of ``ARDIST_FAULT``."""

    kind: str
    point: str
    rank: int | None
    visit: int | None
    argument: str | None


def parse(text: str) -> list[Fault]:
    """Parse the variable; raises ValueError for anything that is not understood."""
    faults = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = _SYNTAX.match(part)
        if match is None or match["kind"] not in KINDS or not _fits(match["kind"], match["argument"]):
            raise ValueError(
                f"{VARIABLE}: cannot read {part!r}; expected kind@point[/rank][#visit][:argument] with kind in "
                f"{KINDS}, a number as argument of raise, exit and sleep, a file as that of wait, any text as that of "
                "value"
            )
        number = {name: int(match[name]) if match[name] else None for name in ("rank", "visit")}
        faults.append(Fault(match["kind"], match["point"], number["rank"], number["visit"], match["argument"]))
    return faults


def _fits(kind: str, argument: str | None) -> bool:
    if kind == "wait":
        return argument is not None
    if argument is None or kind not in ("raise", "exit", "sleep"):
        return True
    return re.fullmatch(r"\d+" if kind != "sleep" else r"\d+(\.\d*)?|\.\d+", argument) is not None


def point(name: str) -> str | None:
    """Give a planned fault the chance to strike here; returns the argument of a ``value`` fault, else None."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    _visits[name] += 1
    for fault in parse(text):
        if fault.point != name or fault.visit not in (None, _visits[name]):
            continue
        if fault.rank is not None and fault.rank != int(os.environ.get("RANK", "0")):
            continue
        if fault.kind == "value":
            return fault.argument or ""
        _strike(fault)
    return None


def _strike(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "exit":
        os._exit(int(fault.argument or "1"))
    elif fault.kind == "sleep":
        time.sleep(float(fault.argument or "1"))
    elif fault.kind == "wait":
        while not os.path.exists(str(fault.argument)):
            time.sleep(0.01)
    else:
        code = int(fault.argument or errno.EIO)
        raise OSError(code, os.strerror(code), f"injected at {fault.point}")
