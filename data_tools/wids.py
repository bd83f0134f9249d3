"""The shard list that readers of the wids format expect."""

from __future__ import annotations

import json
import os

from ardist.data.manifest import load_manifest
from ardist.storage import is_remote, open_storage


def wids_description(url: str, beside: bool) -> bytes:
    """JSON of wids version 1: every shard with its address and number of samples.

    Local shards are named relative to the description where it lies `beside` the manifest: the folder can be moved.
    """
    manifest = load_manifest(url)
    storage = open_storage(url)
    base = f"{storage.url}/" if is_remote(url) or not beside else ""
    shards = [
        {"url": f"{base}{shard.name}", "nsamples": shard.n, "filesize": shard.bytes, "sha256": shard.sha256}
        for shard in manifest.shards
    ]
    return (json.dumps({"wids_version": 1, "name": manifest.dataset_id, "shardlist": shards}, indent=1) + "\n").encode()


def export_wids(url: str, out: str | None) -> str:
    """Write the description to `out`, or as ``wids.json`` into the dataset; returns where it is."""
    folder, _, name = (out or f"{url.rstrip('/')}/wids.json").rpartition("/")
    storage = open_storage(folder or os.curdir)
    data = wids_description(url, storage.url == open_storage(url).url)
    storage.put(name, data)
    return f"{storage.url}/{name}"
