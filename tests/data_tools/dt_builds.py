"""A short way to build in tests, and to read what was built with nothing of ours."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from ardist.data.manifest import load_manifest
from data_tools import layout
from data_tools.build import BuildOptions, Summary, build, make_parameters
from data_tools.encode import EncoderChoice
from data_tools.labels import Labels
from data_tools.shard import ShardSettings

SMALL = {"num_frames": 4, "size": 16, "stride": 4, "samples_per_shard": 4}


def build_small(
    videos: Path | str,
    out: Path | str,
    encoder: EncoderChoice | None = None,
    labels: Labels | None = None,
    **changes: Any,
) -> Summary:
    """Build tiny clips; keywords are parameters, or options of the same name."""
    encoder = encoder or EncoderChoice()
    options = {name: changes.pop(name) for name in list(changes) if name in BuildOptions.__dataclass_fields__}
    options.setdefault("shard", ShardSettings(decoders=2))
    options.setdefault("probers", 2)
    parameters = make_parameters(encoder.make(), **{**SMALL, **changes})
    return build(str(videos), str(out), encoder, parameters, labels=labels, options=BuildOptions(**options))


def samples(out: Path) -> dict[str, tuple[np.ndarray, dict[str, object]]]:
    """Everything in a dataset, read with tarfile alone."""
    found: dict[str, tuple[np.ndarray, dict[str, object]]] = {}
    for shard in load_manifest(out).shards:
        with tarfile.open(out / shard.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            key, _, kind = name.partition(".")
            if kind == "npy":
                found[key] = (np.load(io.BytesIO(data), allow_pickle=False), json.loads(members[f"{key}.json"]))
    return found


def quarantine(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / layout.QUARANTINE).read_text().splitlines()]
