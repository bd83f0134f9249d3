"""From commits to a manifest: a pure fold, the same whoever runs it and however often."""

from __future__ import annotations

import json
import logging
from typing import Any

import ardist
from ardist import fault
from ardist.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    VAEIdentity,
    fold_shards,
    parse_manifest,
)
from ardist.errors import DataError
from ardist.storage import MissingObjectError, Storage
from data_tools import layout
from data_tools.plan import Plan
from data_tools.shard import read_commit

_log = logging.getLogger("data_tools.finalize")


def missing_commits(out: Storage, plan: Plan) -> list[int]:
    """Shards of the plan that are not committed; `DataError` when there are commits beyond the plan."""
    there = committed(out)
    extra = sorted(there - set(range(plan.num_shards)))
    if extra:
        raise DataError(f"{out.url} holds commits of shards {extra[:10]}, but the plan has {plan.num_shards} shards")
    return [shard for shard in range(plan.num_shards) if shard not in there]


def committed(out: Storage) -> set[int]:
    """Numbers of the shards that have a commit."""
    matches = (layout.COMMIT_NAME.fullmatch(name) for name in out.list(layout.COMMITS))
    return {int(match[1]) for match in matches if match is not None}


def finalize(out: Storage, plan: Plan) -> Manifest:
    """Write quarantine.jsonl and then manifest.json; raises `DataError` while a shard is not committed."""
    holes = missing_commits(out, plan)
    if holes:
        shown = ", ".join(map(str, holes[:10])) + (", …" if len(holes) > 10 else "")
        raise DataError(f"{len(holes)} of {plan.num_shards} shards are not committed: {shown}; run build again")
    manifest, records = fold(out, plan)
    out.put(layout.QUARANTINE, quarantine_lines(records))
    fault.point("build.after_quarantine")
    # What was only needed to make the plan: nobody reads it once the plan stands.
    for name in [layout.LISTING, *out.list(layout.PROBES)]:
        out.delete(name)
    if manifest is None:
        raise DataError(f"no clip of any video could be used: {top_reasons(records)}; see {layout.QUARANTINE}")
    fault.point("build.before_manifest")
    out.put(MANIFEST_NAME, manifest.dump())
    fault.point("build.after_manifest")
    return manifest


def fold(out: Storage, plan: Plan) -> tuple[Manifest | None, list[dict[str, object]]]:
    """Manifest (None when no sample is left) and quarantine records that the commits make: reads, writes nothing."""
    commits = [read_commit(out, shard, plan) for shard in range(plan.num_shards)]
    entries = [ShardEntry.model_validate(commit["entry"]) for commit in commits if commit["entry"] is not None]
    return fold_shards(entries, **header(plan)) if entries else None, quarantined(plan, commits)


def quarantine_lines(records: list[dict[str, object]]) -> bytes:
    """``quarantine.jsonl``."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def header(plan: Plan) -> dict[str, Any]:
    """The manifest's fields that the plan decides."""
    identity = plan.parameters.encoder
    vae = None
    if identity.kind == "latents":
        assert identity.weights_digest is not None
        assert identity.config_digest is not None
        vae = VAEIdentity(weights_digest=identity.weights_digest, config_digest=identity.config_digest)
    return {
        "dataset_id": f"{identity.kind}-{plan.digest[:16]}",
        "created": plan.created,
        "code_version": plan.tools.get("ardist", ardist.__version__),
        "kind": identity.kind,
        "vae": vae,
        "tools": plan.tools,
        "preprocessing": plan.parameters.model_dump(mode="json", exclude={"encoder"})
        | {"precision": identity.precision, "plan": plan.digest},
        "classes": None if plan.classes is None else tuple(plan.classes),
    }


def quarantined(plan: Plan, commits: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Everything that was refused: whole videos first, then clips in plan order."""
    videos = [source.refused for source in plan.sources if source.refused is not None]
    return [*videos, *(record for commit in commits for record in commit["quarantine"])]


def top_reasons(records: list[dict[str, object]], most: int = 5) -> str:
    """``12 x damaged, 3 x format`` of the most frequent reasons."""
    counts: dict[str, int] = {}
    for record in records:
        counts[str(record["reason"])] = counts.get(str(record["reason"]), 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    return ", ".join(f"{count} x {reason}" for reason, count in ordered) or "nothing was refused"


def standing_manifest(out: Storage) -> Manifest | None:
    """The finished dataset's manifest, or None while there is none."""
    try:
        data = out.read(MANIFEST_NAME)
    except MissingObjectError:
        return None
    return parse_manifest(data, f"{out.url}/{MANIFEST_NAME}")
