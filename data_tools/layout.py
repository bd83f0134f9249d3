"""Names of the objects of a dataset and of its build."""

from __future__ import annotations

import re

CLAIM = "build.json"
LISTING = "listing.jsonl"
SOURCES = "sources.jsonl"
PLAN = "plan.jsonl"
QUARANTINE = "quarantine.jsonl"
COMMITS, LEASES, PROBES, SHARDS = "commits/", "leases/", "probes/", "shards/"

SHARD_NAME = re.compile(r"shards/shard-(\d{6,})-[0-9a-f]{8}\.(tar|idx)")
COMMIT_NAME = re.compile(r"commits/(\d{6,})\.json")


def commit_name(shard: int) -> str:
    """The one object that makes a shard part of the dataset."""
    return f"{COMMITS}{shard:06d}.json"


def probe_name(chunk: int) -> str:
    """Probe results of a run of listed files."""
    return f"{PROBES}{chunk:06d}.jsonl"
