"""Removing what no finished or running build needs: shards of lost races, dead staging folders, stale uploads."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from ardist.data.manifest import MANIFEST_NAME
from ardist.errors import DataError
from ardist.storage import LocalStorage, Storage, open_storage
from ardist.storage.base import CONDITION_PROBE
from ardist.storage.local import TEMPORARY
from data_tools import layout
from data_tools.finalize import committed, standing_manifest
from data_tools.plan import load_plan
from data_tools.shard import read_commit
from data_tools.staging import is_locked


@dataclass
class Garbage:
    """What was, or would be, removed: names and their bytes."""

    names: list[str] = field(default_factory=list)
    bytes: int = 0
    uploads: int = 0


def collect(url: str, *, older_than: float, dry_run: bool) -> Garbage:
    """Remove objects that belong to nothing and are older than `older_than` seconds.

    Never touched: the manifest's shards, committed shards, and anything young enough to belong to a builder at work.
    """
    storage = open_storage(url)
    if not any(storage.exists(name) for name in (layout.CLAIM, layout.PLAN, MANIFEST_NAME)):
        raise DataError(f"{storage.url} holds no dataset; nothing was removed")
    garbage = Garbage()
    needed = _needed(storage)
    finished = standing_manifest(storage) is not None
    loose = (layout.LEASES, layout.PROBES, layout.ROWS) if finished else ()
    now = time.time()
    for prefix in (layout.SHARDS, CONDITION_PROBE, *loose):
        for info in list(storage.walk(prefix)):
            if info.name not in needed and now - info.modified >= older_than:
                garbage.names.append(info.name)
                garbage.bytes += info.size
                if not dry_run:
                    storage.delete(info.name)
    if isinstance(storage, LocalStorage):
        _collect_unfinished(storage.root, older_than, dry_run, garbage)
    else:
        from ardist.storage.s3 import S3Storage

        if isinstance(storage, S3Storage) and not dry_run:
            garbage.uploads = storage.abort_uploads(older_than)
    return garbage


def _needed(storage: Storage) -> set[str]:
    """Names that the manifest or a commit refers to; raises `DataError` rather than guess from damaged records."""
    needed: set[str] = set()
    manifest, plan = standing_manifest(storage), load_plan(storage)
    shards = [shard.name for shard in manifest.shards] if manifest else []
    if plan is not None:
        needed.add(plan.header.rows_name)
        for shard in sorted(committed(storage)):
            entry = read_commit(storage, shard, plan)["entry"]
            shards += [] if entry is None else [entry["name"]]
    for name in shards:
        needed |= {name, name.removesuffix(".tar") + ".idx"}
    return needed


def _collect_unfinished(root: Path, older_than: float, dry_run: bool, garbage: Garbage) -> None:
    """Temporary files and staging folders whose owner is gone."""
    for path in sorted(root.rglob(f"{TEMPORARY}*")) if root.is_dir() else []:
        status = path.lstat()
        if time.time() - status.st_mtime < older_than or is_locked(path):
            continue
        garbage.names.append(path.relative_to(root).as_posix())
        garbage.bytes += status.st_size
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
