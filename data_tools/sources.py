"""Which videos there are: a folder, a single file, a list of paths or an ``s3://`` prefix."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ardist.errors import ConfigError
from ardist.events import events
from ardist.storage import MissingObjectError, is_remote, open_storage
from data_tools.reasons import Reason

EXTENSIONS = frozenset(
    ("mp4", "m4v", "mov", "qt", "3gp", "3g2", "f4v", "mkv", "webm", "avi", "mpg", "mpeg", "m2v", "ts", "m2ts", "mts")
    + ("wmv", "asf", "flv", "ogv", "ogg", "mxf", "ivf", "nut", "y4m", "dv", "gif")
)
"""File names that are taken for videos; what they really hold, the probe decides."""

LISTS = frozenset({"txt", "lst", "list"})


@dataclass(frozen=True, slots=True)
class Listed:
    """One candidate: name relative to the root, bytes, opaque version; `refused` when a look was enough."""

    name: str
    size: int
    version: str
    refused: Reason | None = None

    def line(self) -> str:
        """Its line of ``listing.jsonl``."""
        fields = {"name": self.name, "size": self.size, "version": self.version}
        if self.refused is not None:
            fields["refused"] = str(self.refused)
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def parse(cls, line: str) -> Listed:
        """The inverse of `line`."""
        fields = json.loads(line)
        refused = fields.get("refused")
        return cls(fields["name"], fields["size"], fields["version"], Reason(refused) if refused else None)


@dataclass(frozen=True)
class SourceRoot:
    """Where names of a listing lead to: a local folder, or an object store."""

    address: str

    @property
    def remote(self) -> bool:
        """Whether files must be fetched before they can be opened."""
        return is_remote(self.address)

    def path(self, name: str) -> str:
        """Local path of a listed name."""
        return os.path.join(self.address, name)


def list_sources(videos: str, exclude: str | None = None) -> tuple[SourceRoot, list[Listed]]:
    """Root and candidates, sorted by name. `exclude` is an output folder that may lie inside.

    Raises `ConfigError` for an address that cannot be listed; an empty list is the caller's to judge.
    """
    if is_remote(videos):
        return _list_remote(videos)
    path = os.path.abspath(os.path.expanduser(videos.removeprefix("file://")))
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"--videos {videos!r} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(found.st_mode):
        skip = None if exclude is None or is_remote(exclude) else os.path.realpath(exclude)
        names = sorted(_names_below(path, skip))
        return SourceRoot(path), [_look(path, name) for name in names]
    if _extension(path) in LISTS:
        return _list_file(path)
    return SourceRoot(os.path.dirname(path)), [_look(os.path.dirname(path), os.path.basename(path))]


def _names_below(root: str, skip: str | None) -> Iterator[str]:
    """Names of candidates below `root`; linked folders are entered once, so loops end."""
    entered: set[tuple[int, int]] = set()
    ignored = 0
    pending = [""]
    while pending:
        relative = pending.pop()
        folder = os.path.join(root, relative) if relative else root
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                events.count("build.folder_skipped", folder=folder, reason="already entered (a link)")
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not relative:
                raise ConfigError(f"the folder {folder!r} cannot be read: {error.strerror}") from None
            events.count("build.folder_skipped", folder=folder, reason=error.strerror)
            continue
        for entry in entries:
            name = os.path.join(relative, entry.name)
            if skip is not None and os.path.realpath(entry.path) == skip:
                continue
            if entry.name.startswith("."):
                ignored += 1
            elif _is_folder(entry):
                if _extension(entry.name) in EXTENSIONS:
                    yield name
                pending.append(name)
            elif _extension(entry.name) in EXTENSIONS or "." not in entry.name:
                yield name
            else:
                ignored += 1
    if ignored:
        events.count("build.ignored_files", ignored, level=20, root=root, reason="hidden or not named like a video")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look(root: str, name: str) -> Listed:
    try:
        found = os.stat(os.path.join(root, name))
    except FileNotFoundError:
        return Listed(name, 0, "", Reason.VANISHED)
    except OSError:  # a loop of links, a folder without permission
        return Listed(name, 0, "", Reason.UNREADABLE)
    if not stat.S_ISREG(found.st_mode):
        return Listed(name, 0, "", Reason.NOT_A_FILE)
    return Listed(name, found.st_size, local_version(found), Reason.EMPTY if found.st_size == 0 else None)


def local_version(found: os.stat_result) -> str:
    """What must stay equal between listing and reading a local file."""
    return f"{found.st_size}-{found.st_mtime_ns}"


def _list_file(path: str) -> tuple[SourceRoot, list[Listed]]:
    """A text file with one path per line, relative to the file's folder or absolute; # begins a comment."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"the list {path!r} cannot be read: {error.strerror}") from None
    root = os.path.dirname(path)
    # Names may hold anything else that ends a line of text.
    lines = (line.removesuffix("\r") for line in data.decode("utf-8", "surrogateescape").split("\n"))
    names = {os.path.relpath(os.path.join(root, line), root) for line in lines if line and line[0] != "#"}
    return SourceRoot(root), [_look(root, name) for name in sorted(names)]


def _list_remote(videos: str) -> tuple[SourceRoot, list[Listed]]:
    storage = open_storage(videos)
    try:
        listed = [
            Listed(info.name, info.size, info.version, Reason.EMPTY if info.size == 0 else None)
            for info in storage.walk()
            if _extension(info.name) in EXTENSIONS
        ]
    except MissingObjectError as error:
        raise ConfigError(f"--videos {videos!r} cannot be read: {error}") from None
    if not listed and _extension(videos) in EXTENSIONS:
        parent, _, name = videos.rpartition("/")
        info = open_storage(parent).stat(name)
        return SourceRoot(parent), [Listed(name, info.size, info.version)]
    return SourceRoot(videos.rstrip("/")), listed


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].removeprefix(".").lower()
