"""Which task of a cluster job this process is: read from what Slurm and torchrun put into the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ardist.errors import ConfigError

_LABELS = {"SLURM_ARRAY_TASK_ID": "slurm", "SLURM_PROCID": "proc", "RANK": "rank"}
_LOCAL = ("LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True)
class ClusterTask:
    """One of many: `label` names it for people, `local` counts the tasks of this machine from 0 and picks a GPU."""

    label: str
    local: int


def cluster_task(environment: Mapping[str, str] = os.environ) -> ClusterTask | None:
    """The task that this process is, or None outside of a cluster job; `ConfigError` for numbers that are none."""
    found = {name: environment[name] for name in (*_LABELS, *_LOCAL) if environment.get(name)}
    for name, value in found.items():
        if re.fullmatch(r"\d{1,9}", value) is None:
            raise ConfigError(f"{name}={value!r} in the environment is not the number of a task; legal: 0, 1, 2, …")
    labels = [f"{kind}{found[name]}" for name, kind in _LABELS.items() if name in found]
    if not labels:
        return None
    return ClusterTask("-".join(labels), next((int(found[name]) for name in _LOCAL if name in found), 0))
