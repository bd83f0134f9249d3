"""Checkpoints in an object store: parts first, the commit by a conditional creation last, pruning after it.

``step-00001200/<write>/part-…`` are the parts of one attempt at writing the step, ``step-00001200/COMMIT.json`` names
the attempt that counts. Nothing without the commit is ever seen, and of two writers of a step only one commits.
"""

from __future__ import annotations

import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ardist import fault
from ardist.config.training import CheckpointConfig
from ardist.errors import ArdistError, CheckpointError
from ardist.events import events
from ardist.storage import MissingObjectError, Storage, open_storage
from ardist.storage.s3 import S3Storage
from ardist.training import commit as commits
from ardist.training.claim import Claim
from ardist.training.commit import COMMIT, Commit, Part
from ardist.training.distributed import World
from ardist.training.store import CheckpointStore, FolderStore

STALE_UPLOAD_SECONDS = 3600.0
"""Unfinished uploads older than this belong to a run that is gone."""

_COMMITTED = re.compile(r"step-(\d{8,})/COMMIT\.json$")
_WITHIN = re.compile(r"step-(\d{8,})/(.+)$")


class ObjectStore(CheckpointStore):
    """Checkpoints below ``s3://bucket/prefix``; parts pass through `staging`, a folder of each machine."""

    def __init__(self, url: str, staging: Path) -> None:
        self.storage: Storage = open_storage(url)
        self.where = self.storage.url
        self.host = socket.gethostname()
        self.staging = staging / f".staging-{self.host}"
        self._claim: Claim | None = None

    def steps(self) -> list[int]:
        found = (_COMMITTED.match(name) for name in self.storage.list("step-"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def commit_of(self, step: int) -> Commit:
        try:
            text = self.storage.read(_name(step, COMMIT))
        except MissingObjectError:
            raise CheckpointError(f"{self.show(step)} holds no {COMMIT}: it was never committed") from None
        return commits.parse_commit(text, f"{self.show(step)}/{COMMIT}")

    def show(self, step: int) -> str:
        return f"{self.where}/{commits.directory_name(step)}"

    def folder_for(self, write: str) -> Path:
        folder = self.staging / write
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def deliver(self, write: str, parts: Sequence[Part]) -> None:
        for part in parts:
            self.storage.put(_part_name(write, part.file), self.staging / write / part.file, move=True)
            fault.point("checkpoint.after_upload")

    def publish(self, write: str, commit: Commit) -> str | None:
        if self._claim is not None and (other := self._claim.lost()):
            return other
        commit = commit.model_copy(update={"folder": write})
        for part in commit.parts:
            found = self.storage.size(_part_name(write, part.file))
            if found != part.bytes:
                return f"{part.file} has {found} bytes in the store instead of {part.bytes}"
        fault.point("checkpoint.before_commit")
        content = commits.commit_text(commit).encode()
        name = _name(commit.step, COMMIT)
        if not self.storage.create(name, content):
            sizes = {info.name: info.size for info in self.storage.walk(f"{commits.directory_name(commit.step)}/")}
            if self._good_folder(commit.step, sizes) is not None:
                return f"{self.show(commit.step)} exists already and is good; it is kept"
            self.set_aside(commit.step)
            if not self.storage.create(name, content):
                return f"{self.show(commit.step)} is being written by another job"
        fault.point("checkpoint.after_commit")
        return None

    def discard(self, write: str) -> None:
        for name in list(self.storage.list(_part_name(write, ""))):
            self.storage.delete(name)

    def clean_up(self, write: str) -> None:
        shutil.rmtree(self.staging / write, ignore_errors=True)

    def prune(self, keep: int) -> None:
        sizes = {info.name: info.size for info in self.storage.walk("step-")}
        good, kept = 0, {}
        for step in self.steps():
            folder = self._good_folder(step, sizes)
            if good >= keep:
                self.storage.delete(_name(step, COMMIT))  # first out of sight, as a half-removed one is no checkpoint
                fault.point("checkpoint.during_prune")
            else:
                good += folder is not None
                kept[step] = folder  # a bad one is left as it is, for a person to look at
        for name in sizes:
            match = _WITHIN.match(name)
            if match and _is_leftover(int(match[1]), match[2], kept):
                self.storage.delete(name)
        if isinstance(self.storage, S3Storage):
            aborted = self.storage.abort_uploads(STALE_UPLOAD_SECONDS)
            if aborted:
                events.count("checkpoint.upload_aborted", aborted, where=self.where)

    def fetch(self, step: int, commit: Commit, world: World) -> tuple[Path | None, str]:
        """Each machine gets all parts, its ranks share them; what is read again is proved again."""
        path = self.staging / commits.directory_name(step)
        hosts = world.all_gather(self.host)
        neighbours = [rank for rank, host in enumerate(hosts) if host == self.host]
        mine = commit.parts[neighbours.index(world.rank) :: len(neighbours)]
        problem = next(self._fetch_problems(path, commit, mine), None)
        problem = next(filter(None, world.all_gather(problem)), None)
        if problem is None:
            return path, ""
        self.release(path, world)
        return None, str(problem)

    def _fetch_problems(self, path: Path, commit: Commit, parts: Sequence[Part]) -> Iterator[str]:
        try:
            path.mkdir(parents=True, exist_ok=True)
            for part in parts:
                name = _part_name(str(commit.folder), part.file)
                if self.storage.size(name) != part.bytes:
                    yield f"{part.file} has {self.storage.size(name)} bytes instead of {part.bytes}"
                elif self.storage.download(name, path / part.file) != part.sha256:
                    yield f"{part.file} is damaged: its sha256 is not {part.sha256[:12]}…"
        except (OSError, ArdistError) as error:
            yield f"parts cannot be fetched: {error}"

    def release(self, path: Path, world: World) -> None:
        world.barrier()
        shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, step: int) -> None:
        name = _name(step, COMMIT)
        self.storage.put(f"{name}.damaged-{secrets.token_hex(3)}", self.storage.read(name))
        self.storage.delete(name)

    def lock(self, owner: str) -> None:
        self._claim = Claim(self.storage, f"{self.host}:{owner}")
        self._claim.take()

    def unlock(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def check(self) -> None:
        self.storage.check_conditional_create()

    def _good_folder(self, step: int, sizes: Mapping[str, int]) -> str | None:
        """Where the parts of a checkpoint lie if all have their sizes, else None."""
        try:
            commit = self.commit_of(step)
        except CheckpointError as error:
            events.count("checkpoint.unreadable", path=self.show(step), reason=error)
            return None
        folder = str(commit.folder)
        whole = all(sizes.get(_part_name(folder, part.file)) == part.bytes for part in commit.parts)
        return folder if whole else None


def open_store(config: CheckpointConfig, folder: Path) -> CheckpointStore:
    """Where a run keeps its checkpoints: `folder` of its run directory, or the object store it names."""
    if config.url is None:
        return FolderStore(folder)
    return ObjectStore(config.url, staging_folder(config, folder))


def staging_folder(config: CheckpointConfig, folder: Path) -> Path:
    """Where parts wait on their way to and from an object store."""
    return folder if config.staging is None else Path(config.staging).expanduser()


def _name(step: int, file: str) -> str:
    return f"{commits.directory_name(step)}/{file}"


def _part_name(write: str, file: str) -> str:
    """Object of a part; the step is the first word of the write's name."""
    return f"{write.partition('.')[0]}/{write}/{file}"


def _is_leftover(step: int, rest: str, kept: Mapping[int, str | None]) -> bool:
    """Whether an object of a step belongs to no checkpoint: to one that was pruned, or to a write that never ended."""
    if step not in kept:
        return ".damaged-" not in rest
    folder, _, file = rest.partition("/")
    return kept[step] is not None and bool(file) and folder != kept[step]
