"""From an address of videos to a frozen plan, each step one object that is created once and never changed."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ardist import fault
from ardist.data.manifest import MANIFEST_NAME
from ardist.errors import ConfigError, DataError
from ardist.media import ffmpeg_binary
from ardist.storage import MissingObjectError, Storage
from data_tools import layout
from data_tools.fetch import local_copy
from data_tools.labels import Labels
from data_tools.lease import Leases, Pace, worker_name
from data_tools.parameters import BuildParameters
from data_tools.plan import Plan, Source, make_plan, parse_sources, source_lines
from data_tools.probe import ProbeCaps, VideoFacts
from data_tools.probe_pool import probe_all
from data_tools.reasons import Reason, Refusal
from data_tools.sealed import seal, unseal
from data_tools.sources import Listed, SourceRoot, list_sources

CHUNK = 256
"""Listed files whose probe results make one object."""

_EXPLAINED = {
    Reason.VANISHED: "gone when it was listed (a broken link?)",
    Reason.UNREADABLE: "cannot be looked at",
    Reason.NOT_A_FILE: "a folder, FIFO, socket or device",
    Reason.EMPTY: "zero bytes",
}

_LOOKS_DAMAGED = frozenset(
    (Reason.FORMAT, Reason.NO_VIDEO, Reason.CODEC, Reason.ENCRYPTED, Reason.DAMAGED, Reason.TIMESTAMPS)
    + (Reason.CRASHED, Reason.TIMEOUT)
)
"""Refusals that bytes which were changed on their way would give as well."""


@dataclass(frozen=True)
class Claim:
    """What an output folder is for; the first builder writes it, all others compare."""

    videos: str
    parameters: BuildParameters

    def settings(self) -> dict[str, Any]:
        """Flat names and values, for a comparison that people can read."""
        fields = self.parameters.model_dump(mode="json")
        encoder = fields.pop("encoder")
        return {"videos": self.videos, **{f"encoder.{name}": value for name, value in encoder.items()}, **fields}


def take(out: Storage, claim: Claim) -> None:
    """Write the claim, or check that the one that stands is the same; `ConfigError` shows the difference."""
    ours = seal(claim.settings())
    if not out.exists(layout.CLAIM) and any(out.exists(name) for name in (MANIFEST_NAME, layout.PLAN)):
        raise ConfigError(f"{out.url} holds another dataset that this tool did not build; choose another --out")
    if out.create(layout.CLAIM, ours):
        return
    standing = unseal(out.read(layout.CLAIM), f"{out.url}/{layout.CLAIM}")
    settings = claim.settings()
    different = [name for name in {**standing, **settings} if standing.get(name) != settings.get(name)]
    if different:
        lines = [f"  {name}: built with {standing.get(name)!r}, asked for {settings.get(name)!r}" for name in different]
        raise ConfigError(
            f"{out.url} holds a dataset with other parameters; choose another --out or the same parameters\n"
            + "\n".join(lines)
        )


@functools.cache
def _tool_versions() -> tuple[tuple[str, str], ...]:
    line = subprocess.run([ffmpeg_binary(), "-version"], capture_output=True, text=True, check=True).stdout
    versions = {"ffmpeg": line.split("\n")[0].removeprefix("ffmpeg version ").split(" ")[0]}
    for name in ("ardist", "av", "numpy", "torch"):
        versions[name] = importlib.metadata.version(name)
    return tuple(versions.items())


def tool_versions(parameters: BuildParameters) -> dict[str, str]:
    """Programs and libraries that decide what is stored: torch only where there are latents."""
    versions = dict(_tool_versions())
    if parameters.encoder.kind == "pixels":
        del versions["torch"]
    return versions


@dataclass
class Freezer:
    """Makes, or finds, the plan of one output."""

    out: Storage
    claim: Claim
    labels: Labels | None
    workers: int
    timeout: float
    pace: Pace
    staging: Path
    on_probed: Callable[[int, int], None] = lambda done, total: None

    def plan(self) -> Plan:
        """The frozen plan; the listing must be frozen already."""
        standing = load_plan(self.out)
        if standing is not None:
            return standing
        root, listed = freeze_listing(self.out, self.claim)
        sources = self._sources(root, listed)
        standing = load_plan(self.out)
        if standing is not None or sources is None:
            return standing or self.plan()
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        parameters = self.claim.parameters
        tools = tool_versions(parameters)
        draft = make_plan(sources, parameters, tools=tools, created=created, root=root.address)
        fault.point("build.before_sources")
        # Another builder may have been faster: the plan is made of the sources that stand.
        lines = self._create_once(layout.SOURCES, source_lines(draft.sources))
        plan = make_plan(parse_sources(lines), parameters, tools=tools, created=created, root=root.address)
        fault.point("build.before_plan")
        self._create_once(layout.PLAN, plan.dump(lines))
        fault.point("build.after_plan")
        return load_plan(self.out) or plan

    def _create_once(self, name: str, data: bytes) -> bytes:
        return data if self.out.create(name, data) else self.out.read(name)

    def _sources(self, root: SourceRoot, listed: Sequence[Listed]) -> list[Source] | None:
        """Probe what nobody has probed, one leased object per chunk; all of them, in order.

        None when meanwhile another builder froze the plan, after which it may tidy the chunks up.
        """
        chunks = [listed[start : start + CHUNK] for start in range(0, len(listed), CHUNK)]
        leases = Leases(self.out, worker_name(), self.pace.lease_seconds)
        while (missing := self._unprobed(len(chunks))) and not self.out.exists(layout.PLAN):
            took_one = False
            for number in missing:
                lease = leases.take(f"probe-{number:06d}")
                if lease is None:
                    continue
                took_one = True
                with lease:
                    if self.out.exists(layout.probe_name(number)):
                        continue
                    fault.point("build.before_probes")
                    probed = self._probe(root, chunks[number], number * CHUNK, len(listed))
                    self.out.create(layout.probe_name(number), source_lines(probed))
                    self.on_probed(min(len(listed), (number + 1) * CHUNK), len(listed))
            if not took_one:
                time.sleep(self.pace.poll_seconds)
        if missing:
            return None
        found: list[Source] = []
        for number, chunk in enumerate(chunks):
            name = layout.probe_name(number)
            part = parse_sources(self.out.read(name))
            if [source.name for source in part] != [item.name for item in chunk]:
                raise DataError(f"{self.out.url}/{name} does not belong to this listing")
            found += part
        return [self._labelled(source) for source in found]

    def _unprobed(self, chunks: int) -> list[int]:
        """Numbers of the chunks without results."""
        there = set(self.out.list(layout.PROBES))
        return [number for number in range(chunks) if layout.probe_name(number) not in there]

    def _probe(self, root: SourceRoot, chunk: Sequence[Listed], done: int, total: int) -> list[Source]:
        parameters = self.claim.parameters
        caps = ProbeCaps(parameters.max_pixels, parameters.max_seconds, parameters.max_aspect)
        sources = [Source(item.name, item.size, item.version) for item in chunk]
        todo = [number for number, item in enumerate(chunk) if item.refused is None]
        for number, item in enumerate(chunk):
            if item.refused is not None:
                refusal = Refusal(item.refused, _EXPLAINED.get(item.refused, str(item.refused)))
                sources[number] = sources[number].refusal(refusal, "scan")
        if root.remote:
            self._probe_remote(root, chunk, todo, sources, caps)
            return sources
        requests = [(root.path(chunk[number].name), chunk[number].version, chunk[number].size) for number in todo]
        for position, answer in enumerate(probe_all(requests, caps, min(self.workers, len(todo) or 1), self.timeout)):
            sources[todo[position]] = _answered(sources[todo[position]], answer)
            self.on_probed(done + position + 1, total)
        return sources

    def _probe_remote(
        self, root: SourceRoot, chunk: Sequence[Listed], todo: Sequence[int], sources: list[Source], caps: ProbeCaps
    ) -> None:
        """Fetch a few objects at a time and probe the copies."""

        def fetch(number: int) -> tuple[ExitStack, local_copy, str | Refusal]:
            stack = ExitStack()
            copy = local_copy(root, chunk[number].name, chunk[number].version, self.staging)
            try:
                return stack, copy, stack.enter_context(copy)[0]
            except Refusal as refusal:
                return stack, copy, refusal

        step = max(1, self.workers) * 2
        with ThreadPoolExecutor(step, thread_name_prefix="fetch") as pool:
            for low in range(0, len(todo), step):
                numbers = todo[low : low + step]
                fetched = dict(zip(numbers, pool.map(fetch, numbers), strict=True))
                ready = [(n, path) for n, (_, _, path) in fetched.items() if isinstance(path, str)]
                requests = [(path, None, chunk[number].size) for number, path in ready]
                probed = probe_all(requests, caps, self.workers, self.timeout)
                answers = {number: answer for (number, _), answer in zip(ready, probed, strict=True)}
                for number, (stack, copy, path) in fetched.items():
                    stack.close()
                    answer = answers[number] if isinstance(path, str) else path
                    if isinstance(answer, Refusal) and answer.reason in _LOOKS_DAMAGED and not copy.checked:
                        answer = self._second_look(root, chunk[number], caps, copy.digest, answer)
                    sources[number] = _answered(sources[number], answer)

    def _second_look(
        self, root: SourceRoot, item: Listed, caps: ProbeCaps, digest: str, answer: Refusal
    ) -> VideoFacts | Refusal:
        """Whether a remote video is bad, or came with wrong bytes: fetched again, other bytes are probed again."""
        copy = local_copy(root, item.name, item.version, self.staging, doubted=digest)
        try:
            with copy as (path, _):
                if copy.digest == digest:
                    return answer
                return next(probe_all([(path, None, item.size)], caps, 1, self.timeout))
        except Refusal as refusal:
            return refusal

    def _labelled(self, source: Source) -> Source:
        if self.claim.parameters.classes_from_folders:
            folder = os.path.basename(os.path.dirname(source.name))
            if not folder:
                refusal = Refusal(Reason.LABEL, "lies in no folder that could name its class")
                return source if source.refused else source.refusal(refusal, "plan")
            return replace(source, class_name=folder.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        if self.labels is None:
            return source
        try:
            label = self.labels.of(source.name)
        except Refusal as refusal:
            return source if source.refused else source.refusal(refusal, "plan")
        return replace(source, class_name=label.class_name, caption=label.caption)


def freeze_listing(out: Storage, claim: Claim) -> tuple[SourceRoot, list[Listed]]:
    """Root and frozen listing of the candidates: an existing one is used as it is.

    Raises `ConfigError` when there are no videos; then nothing was written.
    """
    try:
        lines = out.read(layout.LISTING).decode().splitlines()
        return SourceRoot(json.loads(lines[0])["root"]), [Listed.parse(line) for line in lines[1:]]
    except MissingObjectError:
        root, listed = list_sources(claim.videos, exclude=out.url)
    if not listed:
        raise ConfigError(
            f"no video found in {claim.videos}: looked for files named like videos (.mp4, .mkv, .webm, .avi, …)"
        )
    out.check_conditional_create()
    take(out, claim)
    fault.point("build.after_claim")
    head = json.dumps({"root": root.address})
    text = "".join(line + "\n" for line in (head, *(item.line() for item in listed)))
    if not out.create(layout.LISTING, text.encode()):
        return freeze_listing(out, claim)
    fault.point("build.after_listing")
    return root, listed


def load_plan(out: Storage) -> Plan | None:
    """The frozen plan of an output, or None before there is one."""
    try:
        data = out.read(layout.PLAN)
    except MissingObjectError:
        return None
    return Plan.load(data, out.read(layout.SOURCES))


def _answered(source: Source, answer: VideoFacts | Refusal) -> Source:
    return source.refusal(answer, "probe") if isinstance(answer, Refusal) else replace(source, facts=answer)
