"""COMMIT.json, the one file that makes a directory a checkpoint, and the search for the newest good one."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ardist.config import Section, canonical_digest
from ardist.errors import CheckpointError
from ardist.training.parts import ema_kind, hash_file

COMMIT = "COMMIT.json"
FORMAT = "ardist-checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})$")
_LEFTOVER = re.compile(r"step-\d{8,}\.tmp-[0-9a-f]+$")


class Part(Section):
    """One file of a checkpoint."""

    file: str
    bytes: int
    sha256: str


class Commit(Section):
    """All that a checkpoint says about itself; `state` is what every rank restores alike.

    `folder`: where in an object store the parts are; None: beside the commit.
    """

    format: str = FORMAT
    version: int = VERSION
    step: int
    created: str
    world_size: int
    zero_stage: int
    precision: str
    parts: tuple[Part, ...]
    shapes: dict[str, list[int]]
    kinds: tuple[str, ...]
    adam_steps: dict[int, float]
    ema_decays: tuple[float, ...]
    ema_updates: int
    config: dict[str, Any]
    config_digest: str
    manifest_digest: str | None
    state: dict[str, Any]
    versions: dict[str, str]
    folder: str | None = None

    def kind_of_ema(self, decay: float) -> str:
        """The kind of state that holds the EMA of `decay`; long decays once had shorter names."""
        names = (ema_kind(decay), f"ema_{decay:g}")
        return next((name for name in names if name in self.kinds), names[0])


def directory_name(step: int) -> str:
    """Directory of the checkpoint after `step` optimiser steps."""
    return f"step-{step:08d}"


def temporary_name(step: int) -> str:
    """A name the search never takes for a checkpoint."""
    return f"{directory_name(step)}.tmp-{secrets.token_hex(4)}"


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name."""
    match = _NAME.match(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint (step-00001200)")
    return int(match[1])


def candidates(root: Path) -> list[Path]:
    """Directories named like checkpoints, newest step first; by name, because clocks and mtimes lie."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.match(p.name) and p.is_dir()), key=step_of, reverse=True)


def leftovers(root: Path) -> Iterator[Path]:
    """Directories of interrupted writes and removals."""
    if root.is_dir():
        yield from (path for path in root.iterdir() if _LEFTOVER.match(path.name))


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_text(commit: Commit) -> str:
    """The content of COMMIT.json; it carries a digest of itself."""
    body = commit.model_dump(mode="json")
    return json.dumps({"digest": canonical_digest(body), **body}, indent=1)


def write_commit(directory: Path, commit: Commit) -> None:
    """Write the commit durably."""
    with open(directory / COMMIT, "w", encoding="utf-8") as file:
        file.write(commit_text(commit))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def read_commit(directory: Path) -> Commit:
    """The commit of a checkpoint; `CheckpointError` says what is missing or damaged (parts are not read)."""
    path = directory / COMMIT
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no {COMMIT}: it was never committed") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return parse_commit(text, str(path))


def parse_commit(text: bytes, source: str) -> Commit:
    """A commit from the content of its file; `CheckpointError` says what is damaged or of another version."""
    try:
        body = json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{source} cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{source} is not a commit of an {FORMAT}")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{source} has format version {body.get('version')}; this release reads version {VERSION}"
        )
    digest = body.pop("digest", None)
    if digest != canonical_digest(body):
        raise CheckpointError(f"{source} is damaged: its digest does not match its content")
    try:
        commit = Commit.model_validate(body)
    except ValidationError as error:
        raise CheckpointError(f"{source} is not understood: {error.errors()[0]['msg']}") from None
    for name in (*(part.file for part in commit.parts), commit.folder or ""):
        if "/" in name or name.startswith("."):
            raise CheckpointError(f"{source} names a part outside its directory: {name!r}")
    return commit


def check_part(directory: Path, part: Part) -> str | None:
    """What is wrong with a part's size or sha256, or None."""
    path = directory / part.file
    try:
        size = path.stat().st_size
        if size != part.bytes:
            return f"{part.file} has {size} bytes instead of {part.bytes}"
        found = hash_file(path)
    except OSError as error:
        return f"{part.file} cannot be read: {error.strerror}"
    return (
        None if found == part.sha256 else f"{part.file} is damaged: sha256 {found[:12]}… instead of {part.sha256[:12]}…"
    )


def newest_valid(root: Path, step: int | None = None) -> tuple[Path, Commit]:
    """The newest checkpoint whose commit and parts are good (or the one of `step`), for a single process.

    Raises `CheckpointError` that lists what was wrong with each candidate.
    """
    reasons: list[str] = []
    tried: set[Path] = set()
    # A run that goes on may prune what was listed a moment ago; then there is a newer one to look at.
    while fresh := [path for path in candidates(root) if path not in tried]:
        tried.update(fresh)
        for path in fresh:
            if step is not None and step_of(path) != step:
                continue
            try:
                commit = read_commit(path)
            except CheckpointError as error:
                reasons.append(str(error))
                continue
            problem = next(filter(None, (check_part(path, part) for part in commit.parts)), None)
            if problem is None:
                return path, commit
            reasons.append(f"{path.name}: {problem}")
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    known = ", ".join(str(step_of(path)) for path in reversed(candidates(root))) or "none"
    details = "".join(f"\n  {reason}" for reason in reasons)
    raise CheckpointError(f"no readable {wanted} in {root}; steps there: {known}{details}")
