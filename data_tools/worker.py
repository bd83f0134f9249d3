"""One worker: lease a shard, build it, commit it, until none is left."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any, Protocol

from ardist.storage import Storage, StorageError
from data_tools import layout
from data_tools.encode import Encoder
from data_tools.finalize import missing_commits
from data_tools.lease import Leases, Pace, worker_name
from data_tools.plan import Plan
from data_tools.shard import Counts, ShardBuilder, ShardSettings


class ShardProgress(Protocol):
    """What a worker reports."""

    def advanced(self, shard: int, counts: Counts) -> None:
        """State of a shard that is being built here."""

    def committed(self, shard: int, counts: Counts) -> None:
        """A shard is committed."""


def run_worker(
    plan: Plan,
    storage: Storage,
    encoder: Encoder,
    settings: ShardSettings,
    pace: Pace,
    staging: Path,
    progress: ShardProgress,
    label: str = "",
) -> int:
    """Lease and build shards until all are committed, by whomever; returns how many this worker built."""
    if not plan.num_shards:
        return 0
    worker = worker_name(label)
    leases = Leases(storage, worker, pace.lease_seconds)
    builder = ShardBuilder(plan, storage, encoder, settings, staging)
    builder.on_progress = progress.advanced
    turn = int.from_bytes(hashlib.sha256(worker.encode()).digest()[:4], "little")
    built = 0
    while holes := missing_commits(storage, plan):
        at = turn % len(holes)
        took_one = False
        for shard in holes[at:] + holes[:at]:
            lease = leases.take(f"{shard:06d}")
            if lease is None:
                continue
            took_one = True
            with lease:
                if storage.exists(layout.commit_name(shard)):
                    continue
                commit = _built(builder, shard, worker)
            built += 1
            progress.committed(shard, _counts(commit))
        if not took_one:
            time.sleep(pace.poll_seconds)
    return built


def _built(builder: ShardBuilder, shard: int, worker: str) -> dict[str, Any]:
    """The commit of a shard; a disk that is full or broken, wherever it was met, is one message of ours."""
    try:
        return builder.build(shard, worker)
    except OSError as error:
        place = os.fsdecode(error.filename) if error.filename else builder.staging
        raise StorageError(
            f"cannot write shard {shard} in {place}: {error.strerror or error}; what is committed stays, "
            "run build again when this is mended"
        ) from error


def _counts(commit: dict[str, Any]) -> Counts:
    entry = commit["entry"]
    return Counts(clips=entry["n"] if entry else 0, refused=len(commit["quarantine"]), frames=commit["frames"])
