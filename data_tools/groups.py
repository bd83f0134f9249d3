"""Shard groups: datasets of several frame counts and sizes side by side below one address."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ardist.data.manifest import MANIFEST_NAME
from ardist.errors import ConfigError, DataError
from ardist.storage import MissingObjectError, Storage, open_storage
from data_tools import layout

GROUPS = "groups.json"

_FORM = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})(?:x([1-9]\d{0,5}))?")


@dataclass(frozen=True)
class Group:
    """Clips of `num_frames` frames of `size` x `size` pixels, one every `stride` frames."""

    num_frames: int
    size: int
    stride: int

    @property
    def name(self) -> str:
        """Its folder below the common address."""
        return f"{self.num_frames}x{self.size}"


def parse_group(text: str, stride: int) -> Group:
    """A group from ``FRAMESxSIZE`` or ``FRAMESxSIZExSTRIDE``; `stride` where the text names none."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"--group {text!r} is not of the form FRAMESxSIZE or FRAMESxSIZExSTRIDE, such as 16x256")
    return Group(int(match[1]), int(match[2]), int(match[3] or stride))


def parse_groups(texts: list[str], stride: int) -> list[Group]:
    """All groups of a build; raises `ConfigError` for two of the same frame count and size."""
    groups = [parse_group(text, stride) for text in texts]
    names = [group.name for group in groups]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--group {twice[0]} is given twice; groups differ in their frame count or size")
    return groups


def check_place(out: str, groups: list[Group]) -> None:
    """Raise `ConfigError` where groups would lie below a dataset, or a dataset above groups."""
    storage = open_storage(out)
    if groups and any(storage.exists(name) for name in (layout.CLAIM, MANIFEST_NAME)):
        raise ConfigError(f"{storage.url} holds a dataset without groups; choose another --out")
    if not groups and (names := _recorded(storage)):
        raise ConfigError(f"{storage.url} holds the shard groups {', '.join(names)}; choose another --out")


def record_groups(out: str, groups: list[Group]) -> None:
    """Write down which datasets lie below `out`, together with those that do already."""
    storage = open_storage(out)
    names = {*_recorded(storage), *(group.name for group in groups)}
    storage.put(GROUPS, json.dumps(sorted(names)).encode())


def datasets_at(url: str) -> list[str]:
    """Addresses of the datasets at `url`: itself, or its groups."""
    return [f"{url.rstrip('/')}/{name}" for name in _recorded(open_storage(url))] or [url]


def _recorded(storage: Storage) -> list[str]:
    try:
        names = json.loads(storage.read(GROUPS))
    except MissingObjectError:
        return []
    except ValueError as error:
        raise DataError(f"{storage.url}/{GROUPS} is damaged: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and _FORM.fullmatch(name) for name in names):
        raise DataError(f"{storage.url}/{GROUPS} is damaged: it holds no names of groups")
    return names
