"""From an address of videos to a frozen plan, each step one object that is created once and never changed."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ardist import fault
from ardist.errors import DataError
from ardist.media import ffmpeg_binary
from ardist.storage import MissingObjectError, Storage
from data_tools import layout
from data_tools.claim import Claim
from data_tools.draft import Draft
from data_tools.fetch import local_copy
from data_tools.labels import Labels
from data_tools.lease import Leases, Pace, worker_name
from data_tools.listing import CHUNK, Listing, freeze_listing
from data_tools.parameters import BuildParameters
from data_tools.plan import Plan, load_plan
from data_tools.plan_header import Header
from data_tools.plan_writer import RowsWriter
from data_tools.probe import ProbeCaps, VideoFacts
from data_tools.probe_pool import probe_all
from data_tools.probed import Source, parse_sources, source_lines
from data_tools.reasons import Reason, Refusal
from data_tools.sources import Listed, SourceRoot
from data_tools.staging import writing

_log = logging.getLogger("data_tools.freeze")

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
        """The frozen plan; one builder writes it, the others probe with it and wait."""
        leases = Leases(self.out, worker_name(), self.pace.lease_seconds)
        while (standing := load_plan(self.out)) is None:
            try:
                self._freeze(leases)
            except MissingObjectError:
                # Once a plan stands, what it was made of may be tidied up at any time.
                if not self.out.exists(layout.PLAN):
                    raise
        return standing

    def _freeze(self, leases: Leases) -> None:
        """Return when a plan stands, whoever wrote it."""
        freeze_listing(self.out, self.claim)
        with tempfile.TemporaryDirectory(dir=self.staging, prefix="plan-") as folder:
            with writing(f"a copy of {layout.LISTING}", self.out):
                listing = Listing.read(self.out, Path(folder) / "listing")
            self._probe_all(listing, leases)
            waiting = False
            while not self.out.exists(layout.PLAN):
                lease = leases.take("plan")
                if lease is None:
                    if not waiting:
                        _log.info("waiting for another builder, which makes the plan")
                    waiting = True
                    time.sleep(self.pace.poll_seconds)
                    continue
                with lease:
                    if not self.out.exists(layout.PLAN):
                        _log.info("making the plan of %d videos", listing.count)
                        judged = self._judged(listing)
                        write_plan(self.out, judged, self.claim.parameters, listing.root.address, Path(folder))

    def _judged(self, listing: Listing) -> Iterator[Source]:
        """All probed sources in the order of the listing, with their labels."""
        for number in range(listing.num_chunks):
            fault.point("build.draft")
            yield from map(self._labelled, self._probed(listing, number))

    def _probed(self, listing: Listing, number: int) -> list[Source]:
        name = layout.probe_name(number)
        part = parse_sources(self.out.read(name))
        if [source.name for source in part] != [item.name for item in listing.chunk(number)]:
            raise DataError(f"{self.out.url}/{name} does not belong to this listing")
        return part

    def _probe_all(self, listing: Listing, leases: Leases) -> None:
        """Probe what nobody has probed, one leased object per chunk, until all are there or a plan stands."""
        while (missing := self._unprobed(listing.num_chunks)) and not self.out.exists(layout.PLAN):
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
                    probed = self._probe(listing.root, listing.chunk(number), number * CHUNK, listing.count)
                    self.out.create(layout.probe_name(number), source_lines(probed))
                    self.on_probed(min(listing.count, (number + 1) * CHUNK), listing.count)
            if not took_one:
                time.sleep(self.pace.poll_seconds)

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


def _answered(source: Source, answer: VideoFacts | Refusal) -> Source:
    return source.refusal(answer, "probe") if isinstance(answer, Refusal) else replace(source, facts=answer)


def write_plan(out: Storage, sources: Iterable[Source], parameters: BuildParameters, root: str, folder: Path) -> None:
    """Make the plan of probed sources, unless one stands by then; `folder` is private and holds it meanwhile.

    First the rows, then the header that makes them the plan: whatever dies in between, the next writer of the same
    sources writes the same bytes under the same name. A disk without room for the draft is a `StorageError`.
    """
    rows = folder / "rows"
    with writing("the plan", out), contextlib.closing(Draft(folder, parameters)) as draft, rows.open("xb") as file:
        for source in sources:
            draft.add(source)
        writer = RowsWriter(file, parameters.samples_per_shard)
        draft.write(writer)
    header = Header(
        parameters=parameters,
        tools=tool_versions(parameters),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        root=root,
        num_clips=writer.num_clips,
        num_videos=draft.num_videos,
        reasons=dict(sorted(draft.reasons.items())),
        readable=tuple(draft.readable),
        rows_name=writer.name,
        rows_bytes=writer.num_bytes,
        pages=tuple(writer.pages),
        refused=writer.refused,
        classes=writer.classes,
    )
    fault.point("build.before_rows")
    out.put(header.rows_name, rows, move=True)
    fault.point("build.before_plan")
    if not out.create(layout.PLAN, header.dump()):
        standing = load_plan(out)
        if standing is not None and standing.header.rows_name != header.rows_name:
            out.delete(header.rows_name)
    fault.point("build.after_plan")
