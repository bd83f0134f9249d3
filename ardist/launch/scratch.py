"""Folders for the heartbeats and stacks of a launch. One that was killed outright leaves its own behind; the next
launch on the machine removes it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ardist.events import events
from ardist.process_identity import began, is_running, machine_id

PREFIX = "ardist-"
OWNER = "launcher.json"


def make() -> Path:
    """A new folder of this process, after those of dead ones are gone; may raise `OSError`."""
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    me = {"pid": os.getpid(), "since": began(os.getpid()), **_where()}
    (folder / OWNER).write_text(json.dumps(me), encoding="utf-8")
    return folder


def _sweep(place: Path) -> None:
    for path in place.glob(f"{PREFIX}*/{OWNER}"):
        try:
            owner: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            # Containers may share the folder and nothing else: process ids of others mean nothing here.
            ours = {name: owner[name] for name in _where()} == _where()
            dead = ours and not is_running(int(owner["pid"]), float(owner["since"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another user's, or it is being written at this moment
        if dead:
            shutil.rmtree(path.parent, ignore_errors=True)
            events.count("launch.scratch_removed", path=path.parent)


def _where() -> dict[str, str]:
    """What tells the processes of one kernel and container from all others."""
    namespace = Path("/proc/self/ns/pid")
    return {"machine": machine_id(), "namespace": os.readlink(namespace) if namespace.is_symlink() else ""}
