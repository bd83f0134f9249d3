"""From commits to a manifest: a pure fold, the same whoever runs it and however often."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from data_tools.reasons import quarantine_line
from data_tools.shard import read_commit
from data_tools.staging import staging_folder, writing

_log = logging.getLogger("data_tools.finalize")


def missing_commits(out: Storage, plan: Plan) -> list[int]:
    """Shards of the plan that are not committed; `DataError` when there are commits beyond the plan."""
    there = committed(out)
    extra = sorted(shard for shard in there if shard >= plan.num_shards)
    if extra:
        raise DataError(f"{out.url} holds commits of shards {extra[:10]}, but the plan has {plan.num_shards} shards")
    return [shard for shard in range(plan.num_shards) if shard not in there]


def committed(out: Storage) -> set[int]:
    """Numbers of the shards that have a commit."""
    matches = (layout.COMMIT_NAME.fullmatch(name) for name in out.list(layout.COMMITS))
    return {int(match[1]) for match in matches if match is not None}


@dataclass(frozen=True)
class Folded:
    """What the commits make: the manifest (None when no sample is left) and how many were refused, by reason."""

    manifest: Manifest | None
    refused_clips: int
    reasons: Mapping[str, int]

    @property
    def top_reasons(self) -> str:
        """``12 x damaged, 3 x format`` of the most frequent reasons."""
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))[:5]
        return ", ".join(f"{count} x {reason}" for reason, count in ordered) or "nothing was refused"


def finalize(out: Storage, plan: Plan) -> Folded:
    """Write quarantine.jsonl and then manifest.json.

    Raises `DataError` while a shard is not committed, `StorageError` for a disk without room.
    """
    holes = missing_commits(out, plan)
    if holes:
        shown = ", ".join(map(str, holes[:10])) + (", …" if len(holes) > 10 else "")
        raise DataError(f"{len(holes)} of {plan.num_shards} shards are not committed: {shown}; run build again")
    # The folder is gone before there is a manifest: of a finished dataset nobody looks for what a kill left behind.
    with staging_folder(out) as staging:
        with writing(layout.QUARANTINE, out), (staging / layout.QUARANTINE).open("wb") as file:
            folded = fold(out, plan, file.write)
        out.put(layout.QUARANTINE, staging / layout.QUARANTINE)
    fault.point("build.after_quarantine")
    # What was only needed to make the plan: nobody reads it once the plan stands.
    for name in [layout.LISTING, *out.list(layout.PROBES)]:
        out.delete(name)
    if folded.manifest is None:
        raise DataError(f"no clip of any video could be used: {folded.top_reasons}; see {layout.QUARANTINE}")
    fault.point("build.before_manifest")
    out.put(MANIFEST_NAME, folded.manifest.dump())
    fault.point("build.after_manifest")
    return folded


def fold(out: Storage, plan: Plan, take: Callable[[bytes], object] = lambda lines: None) -> Folded:
    """Go through the commits in order, writing nothing; the lines of quarantine.jsonl go to `take`, piece by piece.

    Refused videos come first, in the order of the listing, then refused clips in plan order.
    """
    plan.stream_refused(take)
    reasons = Counter(plan.header.reasons)
    entries: list[ShardEntry] = []
    refused = 0
    for shard in range(plan.num_shards):
        commit = read_commit(out, shard, plan)
        if commit["entry"] is not None:
            entries.append(ShardEntry.model_validate(commit["entry"]))
        refused += len(commit["quarantine"])
        reasons.update(str(record["reason"]) for record in commit["quarantine"])
        for record in commit["quarantine"]:
            take(quarantine_line(record))
    return Folded(fold_shards(entries, **header(plan)) if entries else None, refused, reasons)


def header(plan: Plan) -> dict[str, Any]:
    """The manifest's fields that the plan decides."""
    identity, classes = plan.parameters.encoder, plan.classes()
    vae = None
    if identity.kind == "latents":
        assert identity.weights_digest is not None
        assert identity.config_digest is not None
        vae = VAEIdentity(weights_digest=identity.weights_digest, config_digest=identity.config_digest)
    return {
        "dataset_id": f"{identity.kind}-{plan.digest[:16]}",
        "created": plan.header.created,
        "code_version": plan.header.tools.get("ardist", ardist.__version__),
        "kind": identity.kind,
        "vae": vae,
        "tools": plan.header.tools,
        "preprocessing": plan.parameters.model_dump(mode="json", exclude={"encoder"})
        | {"precision": identity.precision, "plan": plan.digest},
        "classes": None if classes is None else tuple(classes),
    }


def standing_manifest(out: Storage) -> Manifest | None:
    """The finished dataset's manifest, or None while there is none."""
    try:
        data = out.read(MANIFEST_NAME)
    except MissingObjectError:
        return None
    return parse_manifest(data, f"{out.url}/{MANIFEST_NAME}")
