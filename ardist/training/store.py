"""Where checkpoints are kept: the one protocol of writing and reading them, and its form for a folder.

Crash at any point leaves the previous checkpoint or the new one valid, never neither: every rank delivers its parts
durably; rank 0 checks their sizes and publishes the commit, which alone makes them a checkpoint; only then is what is
older than the newest K good ones removed. `ardist.training.object_store` is the form for S3.
"""

from __future__ import annotations

import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from ardist import fault
from ardist.errors import CheckpointError
from ardist.events import events
from ardist.training import commit as commits
from ardist.training.commit import Commit, Part
from ardist.training.distributed import World


class CheckpointStore(ABC):
    """Checkpoints of one run, named by their step. All methods may raise `OSError` or an `ArdistError`."""

    where: str
    """Address for messages."""

    @abstractmethod
    def steps(self) -> list[int]:
        """Steps of what looks like a checkpoint, newest first; by name, because clocks and mtimes lie."""

    @abstractmethod
    def commit_of(self, step: int) -> Commit:
        """The commit of a checkpoint; `CheckpointError` says what is missing or damaged (parts are not read)."""

    @abstractmethod
    def show(self, step: int) -> str:
        """A checkpoint's address for messages."""

    def new_write(self, step: int, nonce: str) -> str:
        """A name for one attempt at writing a checkpoint, which no search takes for one; `nonce`: hex digits."""
        return f"{commits.directory_name(step)}.tmp-{nonce}"

    @abstractmethod
    def folder_for(self, write: str) -> Path:
        """The folder of this machine into which a rank writes its files, made."""

    @abstractmethod
    def deliver(self, write: str, parts: Sequence[Part]) -> None:
        """Bring this rank's written files to where they will be read from."""

    @abstractmethod
    def publish(self, write: str, commit: Commit) -> str | None:
        """Rank 0, after all ranks delivered: check the parts and commit; what speaks against it, or None."""

    @abstractmethod
    def discard(self, write: str) -> None:
        """Rank 0: remove what was delivered for a write that failed."""

    def clean_up(self, write: str) -> None:  # noqa: B027 - a folder has nothing beside its checkpoints
        """Every rank: remove what the write left on this machine."""

    @abstractmethod
    def prune(self, keep: int) -> None:
        """Rank 0: remove checkpoints older than the newest `keep` good ones, and leftovers of interrupted writes."""

    @abstractmethod
    def fetch(self, step: int, commit: Commit, world: World) -> tuple[Path | None, str]:
        """A folder with the checkpoint's parts, every one proved by its sha256, or None and what is wrong
        (collective; the ranks share the work)."""

    def release(self, path: Path, world: World) -> None:  # noqa: B027 - a folder keeps its checkpoints
        """Let go of a fetched checkpoint (collective)."""

    @abstractmethod
    def set_aside(self, step: int) -> None:
        """Rank 0: rename an unreadable checkpoint, so that the run may write its step again."""

    def lock(self, owner: str) -> None:  # noqa: B027 - the run directory has a lock of its own
        """Rank 0: keep other jobs out; `ConfigError` names one that is already in."""

    def unlock(self) -> None:  # noqa: B027 - as above
        """Let other jobs in."""

    def check(self) -> None:  # noqa: B027 - the run directory proves itself when it is made
        """Raise when nothing can be written here."""


class FolderStore(CheckpointStore):
    """Checkpoints as ``step-00001200/`` in a folder that all ranks see, committed by renaming the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def steps(self) -> list[int]:
        return [commits.step_of(path) for path in commits.candidates(self.root)]

    def commit_of(self, step: int) -> Commit:
        return commits.read_commit(self._path(step))

    def show(self, step: int) -> str:
        return str(self._path(step))

    def folder_for(self, write: str) -> Path:
        folder = self.root / write
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def deliver(self, write: str, parts: Sequence[Part]) -> None:
        """They were written where they are read."""

    def publish(self, write: str, commit: Commit) -> str | None:
        folder = self.root / write
        for part in commit.parts:
            found = (folder / part.file).stat().st_size
            if found != part.bytes:
                return f"{part.file} has {found} bytes on disk instead of {part.bytes}"
        fault.point("checkpoint.before_commit")
        commits.write_commit(folder, commit)
        fault.point("checkpoint.after_commit")
        final = self._path(commit.step)
        if final.exists():
            if _has_its_sizes(final):
                return f"{final} exists already and is good; it is kept"
            final.rename(final.with_name(f"{write}.damaged"))
        folder.rename(final)
        commits.sync_directory(self.root)
        fault.point("checkpoint.after_rename")
        return None

    def discard(self, write: str) -> None:
        shutil.rmtree(self.root / write, ignore_errors=True)

    def prune(self, keep: int) -> None:
        # These first: who is killed here again and again leaves one folder behind and not one each time.
        for path in commits.leftovers(self.root):
            shutil.rmtree(path, ignore_errors=True)
        good = 0
        for path in commits.candidates(self.root):
            if good >= keep:
                doomed = self.root / commits.temporary_name(commits.step_of(path))
                path.rename(doomed)  # first out of sight, so that a half-removed one is never found
                fault.point("checkpoint.during_prune")
                shutil.rmtree(doomed)
            else:
                good += _has_its_sizes(path)

    def fetch(self, step: int, commit: Commit, world: World) -> tuple[Path | None, str]:
        path = self._path(step)
        problem = parts_problem(path, commit, world)
        return (path, "") if problem is None else (None, problem)

    def set_aside(self, step: int) -> None:
        path = self._path(step)
        os.rename(path, path.with_name(f"{path.name}.damaged-{secrets.token_hex(3)}"))

    def _path(self, step: int) -> Path:
        return self.root / commits.directory_name(step)


def parts_problem(path: Path, commit: Commit, world: World) -> str | None:
    """What is wrong with the parts of a checkpoint in a folder that all ranks see, or None (collective)."""
    mine = commit.parts[world.rank :: world.size]
    problem = next(filter(None, (commits.check_part(path, part) for part in mine)), None)
    found: str | None = next(filter(None, world.all_gather(problem)), None)
    return found


def _has_its_sizes(path: Path) -> bool:
    try:
        commit = commits.read_commit(path)
        return all((path / part.file).stat().st_size == part.bytes for part in commit.parts)
    except (CheckpointError, OSError) as error:
        events.count("checkpoint.unreadable", path=path, reason=error)
        return False
