"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ardist.errors import ConfigError


@contextmanager
def publish_directory(target: Path, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty directory beside `target`; when the block succeeds, sync it and rename it to `target`.

    An empty directory at `target` is replaced, and so is one for which `replaces` says yes; anything else is kept and
    refused with a `ConfigError`. When the block fails, `target` is as it was and the new directory is removed.
    """
    target = target.absolute()
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or replaces(target))):
        raise ConfigError(f"{str(target)!r} exists and is something else; choose another place or remove it yourself")
    target.parent.mkdir(parents=True, exist_ok=True)
    nonce = secrets.token_hex(4)
    fresh, old = (target.with_name(f".{target.name}.{word}-{nonce}") for word in ("tmp", "old"))
    fresh.mkdir()
    try:
        yield fresh
        for path in [*fresh.iterdir(), fresh]:
            _sync(path)
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
        _sync(target.parent)
    finally:
        if not target.exists() and old.exists():
            os.rename(old, target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
