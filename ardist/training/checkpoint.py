"""Saving in the background: the snapshot, the parts, the atomic commit, pruning.

The protocol (crash at any point leaves the previous checkpoint or the new one valid, never neither):
``step-N.tmp-<nonce>/`` is made; every rank writes its part and syncs it; sizes and hashes are gathered, which is also
the barrier; rank 0 writes COMMIT.json and syncs; the directory is renamed to ``step-N`` and its parent synced; only
then are checkpoints older than the newest K good ones removed.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ardist import fault
from ardist.errors import CheckpointError
from ardist.events import events
from ardist.training import commit as commits
from ardist.training.commit import Commit, Part
from ardist.training.distributed import World
from ardist.training.ema import ShardedEMA
from ardist.training.fragments import MOMENTS, Fragments
from ardist.training.parts import EXTRA_FILE, ema_kind, part_name, write_part

_log = logging.getLogger("ardist.training")

Tensors = dict[str, torch.Tensor]


@dataclass
class Snapshot:
    """What the loop hands over at a save: everything in the commit that the writer cannot see by itself."""

    step: int
    config: dict[str, Any]
    config_digest: str
    manifest_digest: str | None
    state: dict[str, Any]
    zero_stage: int = 0
    precision: str = "fp32"
    adam_steps: dict[int, float] = field(default_factory=dict)
    ema_updates: int = 0
    kinds: tuple[str, ...] = ()


class CheckpointWriter:
    """Writes checkpoints of one engine; `save` blocks only while the snapshot is taken."""

    def __init__(
        self,
        root: Path,
        fragments: Fragments,
        ema: ShardedEMA | None,
        *,
        keep: int = 3,
        asynchronous: bool = True,
        beside: Mapping[str, Callable[[], Tensors]] | None = None,
    ) -> None:
        """`beside`: more files, by name, whose tensors are the same on every rank; rank 0 writes them."""
        self.root = root
        self.fragments = fragments
        self.ema = ema
        self.keep = keep
        self.asynchronous = asynchronous
        self.beside = beside or {}
        self.world: World = fragments.world
        self.last_saved: int | None = None
        self.blocked_seconds = 0.0
        # The writing thread talks to its peers over a group of its own, so that it never meets the loop's collectives.
        self._group = dist.new_group(backend="gloo") if self.world.size > 1 else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._result: str | None = None
        self._copied: Any = None
        self._frozen: dict[str, torch.Tensor] | None = None
        self._index, self._length = self._layout()

    def _layout(self) -> tuple[list[tuple[str, int, int, int]], int]:
        index, position = [], 0
        for run in self.fragments.owned:
            for fragment in run.fragments:
                index.append((fragment.name, fragment.start, fragment.length, position))
                position += fragment.length
        return index, position

    @torch.no_grad()
    def save(self, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Take a snapshot and write it in the background; with `wait`, return when it is committed.

        Waits first for a write still under way. Raises `CheckpointError` only with `wait`; a failed background write
        is counted as ``checkpoint.failed`` and leaves the older checkpoints alone.
        """
        self.wait()
        began = time.monotonic()
        directory = self.root / str(self.world.broadcast(commits.temporary_name(snapshot.step)))
        snapshot.kinds = self._copy_state()
        snapshot.adam_steps = self.fragments.steps()
        snapshot.ema_updates = self.ema.updates if self.ema else 0
        extra = self._whole_tensors()
        self.blocked_seconds = time.monotonic() - began
        self._result = None
        if self.asynchronous and not wait:
            self._thread = threading.Thread(
                target=self._write, args=(directory, snapshot, extra), name="checkpoint-writer", daemon=True
            )
            self._thread.start()
            return
        self._write(directory, snapshot, extra)
        if self._result is not None:
            raise CheckpointError(f"the checkpoint of step {snapshot.step} could not be written: {self._result}")

    def wait(self, timeout: float | None = None) -> None:
        """Wait until a background write has ended; with `timeout` in seconds, give it up after that (at the end)."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                events.count("checkpoint.abandoned", seconds=timeout)
            self._thread = None

    def _copy_state(self) -> tuple[str, ...]:
        """Copy the owned state into reusable host buffers (pinned with a GPU); returns the kinds of state."""
        sources: dict[str, list[torch.Tensor]] = {"master": [self.fragments.master(r) for r in self.fragments.owned]}
        if self.fragments.has_moments():
            for kind in MOMENTS:
                sources[kind] = [self.fragments.moment(run, kind) for run in self.fragments.owned]
        if self.ema is not None:
            for decay, buffers in self.ema.buffers.items():
                sources[ema_kind(decay)] = buffers
        cuda = self.world.device.type == "cuda"
        for kind, stretches in sources.items():
            if kind not in self._buffers:
                self._buffers[kind] = torch.empty(self._length, dtype=torch.float32, pin_memory=cuda)
            target, position = self._buffers[kind], 0
            for run, stretch in zip(self.fragments.owned, stretches, strict=True):
                for fragment in run.fragments:
                    # On the loop's stream: the next optimiser step is queued behind these copies.
                    target.narrow(0, position, fragment.length).copy_(
                        stretch.narrow(0, fragment.offset, fragment.length), non_blocking=cuda
                    )
                    position += fragment.length
        if cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return tuple(sources)

    def _whole_tensors(self) -> dict[str, Tensors]:
        """Rank 0: the files that are not cut into fragments, by name; those without tensors are left out."""
        files = {EXTRA_FILE: self._module_extras()}
        if self.world.is_main:
            files |= {name: tensors() for name, tensors in self.beside.items()}
        return {name: tensors for name, tensors in files.items() if tensors}

    def _module_extras(self) -> Tensors:
        """Rank 0: buffers and frozen parameters of the model, which no optimiser fragment holds."""
        module = self.fragments.engine.module
        if self._frozen is None:
            self._frozen = _gather_frozen(module)
        kept = set(module.state_dict().keys()) - set(self._frozen)
        buffers = {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in kept}
        return {**self._frozen, **buffers} if self.world.is_main else {}

    def _write(self, directory: Path, snapshot: Snapshot, extra: Mapping[str, Tensors]) -> None:
        """Write this rank's part and take part in the commit; never raises, the outcome is in `_result`."""
        parts: list[Part] = []
        problem: str | None = None
        try:
            if self._copied is not None:
                self._copied.synchronize()
            parts = self._write_parts(directory, snapshot, extra)
        except (OSError, ValueError) as error:
            problem = f"rank {self.world.rank}: {error}"
        try:
            report = {
                "parts": [part.model_dump() for part in parts],
                "adam_steps": snapshot.adam_steps,
                "problem": problem,
            }
            reports = self.world.all_gather(report, group=self._group)
            verdict = self._finish(directory, snapshot, reports) if self.world.is_main else None
            self._result = self.world.broadcast(verdict, group=self._group)
        except RuntimeError as error:  # a peer died: its group is gone, and so will be the run
            self._result = f"rank {self.world.rank}: a peer left while the checkpoint was written: {error}"
        if self._result is None:
            self.last_saved = snapshot.step
        else:
            events.count("checkpoint.failed", step=snapshot.step, reason=self._result)

    def _write_parts(self, directory: Path, snapshot: Snapshot, extra: Mapping[str, Tensors]) -> list[Part]:
        for kind in snapshot.kinds:
            if not bool(torch.isfinite(self._buffers[kind]).all()):
                raise ValueError(f"the {kind} state holds values that are not finite; it is not saved")
        for file, whole in extra.items():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in whole.values()):
                raise ValueError(f"{file} would hold values that are not finite; it is not saved")
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {kind: self._buffers[kind] for kind in snapshot.kinds}
        name = part_name(self.world.rank, self.world.size)
        fault.point("checkpoint.before_part")
        size, digest = write_part(directory / name, tensors, {"fragments": json.dumps(self._index)})
        parts = [Part(file=name, bytes=size, sha256=digest)]
        for name, whole in extra.items():
            size, digest = write_part(directory / name, whole, {})
            parts.append(Part(file=name, bytes=size, sha256=digest))
        fault.point("checkpoint.after_part")
        return parts

    def _finish(self, directory: Path, snapshot: Snapshot, reports: list[dict[str, Any]]) -> str | None:
        """Rank 0: commit, rename, prune; returns what went wrong, or None."""
        try:
            problem = next((report["problem"] for report in reports if report["problem"] is not None), None)
            if problem is not None:
                shutil.rmtree(directory, ignore_errors=True)
                return str(problem)
            parts = [Part.model_validate(part) for report in reports for part in report["parts"]]
            for part in parts:
                found = (directory / part.file).stat().st_size
                if found != part.bytes:
                    return f"{part.file} has {found} bytes on disk instead of {part.bytes}"
            steps = {int(group): value for report in reports for group, value in report["adam_steps"].items()}
            fault.point("checkpoint.before_commit")
            commits.write_commit(directory, self._commit(snapshot, parts, steps))
            fault.point("checkpoint.after_commit")
            final = self.root / commits.directory_name(snapshot.step)
            if final.exists():
                if _has_its_sizes(final):
                    shutil.rmtree(directory)
                    return f"{final} exists already and is good; it is kept"
                final.rename(final.with_name(f"{directory.name}.damaged"))
            directory.rename(final)
            commits.sync_directory(self.root)
            fault.point("checkpoint.after_rename")
            self._prune()
        except OSError as error:
            return f"rank 0: {error}"
        return None

    def _commit(self, snapshot: Snapshot, parts: list[Part], adam_steps: dict[int, float]) -> Commit:
        return Commit(
            step=snapshot.step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            world_size=self.world.size,
            zero_stage=snapshot.zero_stage,
            precision=snapshot.precision,
            parts=tuple(parts),
            shapes=self.fragments.shapes,
            kinds=snapshot.kinds,
            adam_steps=adam_steps,
            ema_decays=self.ema.decays if self.ema else (),
            ema_updates=snapshot.ema_updates,
            config=snapshot.config,
            config_digest=snapshot.config_digest,
            manifest_digest=snapshot.manifest_digest,
            state=snapshot.state,
            versions={name: version(name) for name in ("ardist", "torch", "deepspeed")},
        )

    def _prune(self) -> None:
        """Remove what is older than the newest `keep` committed checkpoints whose files have their sizes."""
        good = 0
        for path in commits.candidates(self.root):
            if good >= self.keep:
                doomed = self.root / commits.temporary_name(commits.step_of(path))
                path.rename(doomed)  # first out of sight, so that a half-removed one is never found
                fault.point("checkpoint.during_prune")
                shutil.rmtree(doomed)
            else:
                good += _has_its_sizes(path)
        for path in commits.leftovers(self.root):
            shutil.rmtree(path, ignore_errors=True)


def _gather_frozen(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that are not trained, whole, on the host; under ZeRO-3 they are partitioned too (collective)."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    if not frozen:
        return {}
    from deepspeed.runtime.zero import GatheredParameters

    partitioned = [p for p in frozen.values() if hasattr(p, "ds_id")]
    with GatheredParameters(partitioned, enabled=bool(partitioned)):
        return {name: p.detach().float().cpu().clone() for name, p in frozen.items()}


def _has_its_sizes(path: Path) -> bool:
    try:
        commit = commits.read_commit(path)
        return all((path / part.file).stat().st_size == part.bytes for part in commit.parts)
    except (CheckpointError, OSError) as error:
        events.count("checkpoint.unreadable", path=path, reason=error)
        return False
