"""Whether a job that failed at its time limit is put back into the queue: not for ever, when it gets no further."""

from __future__ import annotations

import json
import time

from ardist.config import TrainConfig
from ardist.errors import HardwareError
from ardist.launch.cluster import run_directory
from ardist.training.run_dir import append_line

FILE = "requeues.jsonl"


def may_requeue(config: TrainConfig) -> bool:
    """True for a run with a checkpoint, `launch.max_restarts` times for the same one; each time is noted.

    Raises `HardwareError` when it cannot be seen or noted: on a full disk the next job would fail too.
    """
    # Only now: it takes seconds.
    from ardist.training.object_store import open_store

    run_dir = run_directory(config)
    try:
        newest = max(open_store(config.checkpoint, run_dir / "checkpoints").steps(), default=None)
        if newest is None:
            return False
        path = run_dir / FILE
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        before = [json.loads(line)["step"] for line in lines if line]
        if before.count(newest) >= config.launch.max_restarts:
            return False
        run_dir.mkdir(parents=True, exist_ok=True)
        append_line(path, {"step": newest, "time": time.time()})
    except (OSError, ValueError, KeyError) as error:
        raise HardwareError(f"{run_dir}: checkpoints and earlier requeues cannot be seen or noted: {error}") from error
    return True
