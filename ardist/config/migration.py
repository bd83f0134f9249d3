"""Configurations of older releases, made into today's: one small function per version, applied in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final

from ardist.errors import ConfigError

VERSION: Final = 1
"""Version of the schema of training configurations; raised whenever a setting is renamed, removed or means something
else. A new setting with a default needs no new version."""

Migration = Callable[[dict[str, Any]], None]

MIGRATIONS: dict[int, Migration] = {}
"""By the version it starts from: changes settings of that version, in place, to those of the next one."""


def migrate(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings of this release's version from those of any older one (without ``version``: the first).

    Raises `ConfigError`, with both numbers, for settings of a newer release.
    """
    version = settings.get("version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"{source}: version: an integer from 1 to {VERSION} is expected, not {version!r}")
    if version > VERSION:
        raise ConfigError(
            f"{source}: the configuration is of version {version}; this release reads versions 1 to {VERSION}. "
            "Use the release that wrote it, or a newer one"
        )
    changed = copy.deepcopy(dict(settings))
    for number in range(version, VERSION):
        MIGRATIONS[number](changed)
        changed["version"] = number + 1
    return changed
