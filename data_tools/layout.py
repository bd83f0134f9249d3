"""Names of the objects of a dataset and of its build."""

from __future__ import annotations

import re

CLAIM = "build.json"
LISTING = "listing.jsonl"
PLAN = "plan.json"
OLD_PLAN = "plan.jsonl"
QUARANTINE = "quarantine.jsonl"
COMMITS, LEASES, PROBES, ROWS, SHARDS = "commits/", "leases/", "probes/", "plan/", "shards/"

SHARD_NAME = re.compile(r"shards/shard-(\d{6,})-[0-9a-f]{8}\.(tar|idx)")
COMMIT_NAME = re.compile(r"commits/(\d{6,})\.json")


def shard_number(name: str) -> int | None:
    """The number of the shard whose tar or index has this name, or None for a name of another kind."""
    match = SHARD_NAME.fullmatch(name)
    return None if match is None else int(match[1])


def commit_name(shard: int) -> str:
    """The one object that makes a shard part of the dataset."""
    return f"{COMMITS}{shard:06d}.json"


def probe_name(chunk: int) -> str:
    """Probe results of a run of listed files."""
    return f"{PROBES}{chunk:06d}.jsonl"


def rows_name(sha256: str) -> str:
    """The rows of a plan, under a name that their content decides."""
    return f"{ROWS}{sha256[:16]}.jsonl"
