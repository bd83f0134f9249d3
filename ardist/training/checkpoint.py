"""Saving in the background: the snapshot, the parts, the commit, pruning; `ardist.training.store` has the protocol."""

from __future__ import annotations

import json
import logging
import secrets
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
from ardist.errors import ArdistError, CheckpointError
from ardist.events import events
from ardist.training.commit import Commit, Part
from ardist.training.distributed import World
from ardist.training.ema import ShardedEMA
from ardist.training.fragments import Fragments
from ardist.training.host_copy import HostCopy
from ardist.training.parts import EXTRA_FILE, part_name, write_part
from ardist.training.store import CheckpointStore, FolderStore

_log = logging.getLogger("ardist.training")

Tensors = dict[str, torch.Tensor]

FINITE_AT_ONCE = 2**24
"""Values that are checked at a time: the check needs a byte of memory for each."""


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


def _said(error: Exception) -> str:
    """What an error says; of those that are not expected also what they are."""
    expected = isinstance(error, OSError | ValueError | ArdistError)
    return str(error) if expected else f"{type(error).__name__}: {error}"


class CheckpointWriter:
    """Writes checkpoints of one engine; `save` blocks only while the snapshot is taken."""

    def __init__(
        self,
        store: CheckpointStore | Path,
        fragments: Fragments,
        ema: ShardedEMA | None,
        *,
        keep: int = 3,
        asynchronous: bool = True,
        beside: Mapping[str, Callable[[], Tensors]] | None = None,
    ) -> None:
        """`beside`: more files, by name, whose tensors all ranks bring together; rank 0 writes them."""
        self.store = FolderStore(store) if isinstance(store, Path) else store
        self.fragments = fragments
        self.ema = ema
        self.keep = keep
        self.asynchronous = asynchronous
        self.beside = beside or {}
        self.world: World = fragments.world
        self.last_saved: int | None = None
        self.blocked_seconds = 0.0
        """How long the last save kept the loop: the wait for the write before it, and the snapshot."""
        self.waited_seconds = 0.0
        """The first of these two."""
        # The writing thread talks to its peers over a group of its own, so that it never meets the loop's collectives.
        self._group = dist.new_group(backend="gloo", timeout=self.world.timeout) if self.world.size > 1 else None
        # Names of writes are counted, not agreed on: that must not make a save wait for the slowest rank. It does wait
        # where whole tensors are brought together: those of `beside`, and at the first save frozen weights.
        self._nonce = str(self.world.broadcast(secrets.token_hex(4)))
        self._writes = 0
        self._host = HostCopy(fragments, ema)
        self._thread: threading.Thread | None = None
        self._result: str | None = None
        self._frozen: Tensors | None = None

    @torch.no_grad()
    def save(self, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Take a snapshot and write it in the background; with `wait`, return when it is committed.

        Waits first for a write still under way, which is counted as ``checkpoint.waited``. Raises `CheckpointError`
        only with `wait`; a failed background write is counted as ``checkpoint.failed`` and leaves the older
        checkpoints alone.
        """
        began = time.monotonic()
        late = self._thread is not None and self._thread.is_alive()
        self.wait()
        self.waited_seconds = time.monotonic() - began
        if late:
            events.count("checkpoint.waited", step=snapshot.step, seconds=f"{self.waited_seconds:.3f}")
        self._writes += 1
        write = self.store.new_write(snapshot.step, f"{self._nonce}{self._writes:04x}")
        tensors = self._host.take()
        snapshot.kinds = tuple(tensors)
        snapshot.adam_steps = self.fragments.steps()
        snapshot.ema_updates = self.ema.updates if self.ema else 0
        extra = self._whole_tensors()
        self.blocked_seconds = time.monotonic() - began
        self._result = None
        if self.asynchronous and not wait:
            self._thread = threading.Thread(
                target=self._write, args=(write, snapshot, tensors, extra), name="checkpoint-writer", daemon=True
            )
            self._thread.start()
            return
        self._write(write, snapshot, tensors, extra)
        if self._result is not None:
            raise CheckpointError(f"the checkpoint of step {snapshot.step} could not be written: {self._result}")

    def wait(self, timeout: float | None = None) -> None:
        """Wait until a background write has ended; with `timeout` in seconds, give it up after that (at the end)."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                events.count("checkpoint.abandoned", seconds=timeout)
            self._thread = None

    def snapshot_buffers(self) -> list[torch.Tensor]:
        """The host memory that a save copies into, for whoever wants to know what it costs."""
        return list(self._host.buffers.values())

    def _whole_tensors(self) -> dict[str, Tensors]:
        """Rank 0: the files that are not cut into fragments, by name; those without tensors are left out. Collective
        where there are files `beside`, and with frozen weights the first time."""
        files = {EXTRA_FILE: self._module_extras(), **{name: tensors() for name, tensors in self.beside.items()}}
        return {name: tensors for name, tensors in files.items() if tensors and self.world.is_main}

    def _module_extras(self) -> Tensors:
        """Rank 0: buffers and frozen parameters of the model, which no optimiser fragment holds."""
        module = self.fragments.engine.module
        if self._frozen is None:
            self._frozen = self.fragments.frozen.whole()
        kept = set(module.state_dict().keys()) - set(self._frozen)
        buffers = {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in kept}
        return {**self._frozen, **buffers} if self.world.is_main else {}

    def _write(self, write: str, snapshot: Snapshot, tensors: Tensors, extra: Mapping[str, Tensors]) -> None:
        """Write this rank's part and take part in the commit; never raises, the outcome is in `_result`."""
        parts: list[Part] = []
        problem: str | None = None
        try:
            self._host.wait()
            parts = self._write_parts(self.store.folder_for(write), tensors, extra)
            self.store.deliver(write, parts)
        except Exception as error:  # noqa: BLE001 - peers wait for this rank's word, whatever went wrong here
            problem = f"rank {self.world.rank}: {_said(error)}"
        try:
            report = {
                "parts": [part.model_dump() for part in parts],
                "adam_steps": snapshot.adam_steps,
                "problem": problem,
            }
            reports = self.world.all_gather(report, group=self._group)
            verdict = self._finish(write, snapshot, reports) if self.world.is_main else None
            self._result = self.world.broadcast(verdict, group=self._group)
        except RuntimeError as error:  # a peer died: its group is gone, and so will be the run
            self._result = f"rank {self.world.rank}: a peer left while the checkpoint was written: {error}"
        self.store.clean_up(write)
        if self._result is None:
            self.last_saved = snapshot.step
        else:
            events.count("checkpoint.failed", step=snapshot.step, reason=self._result)

    def _write_parts(self, folder: Path, tensors: Tensors, extra: Mapping[str, Tensors]) -> list[Part]:
        files = {part_name(self.world.rank, self.world.size): tensors, **extra}
        for file, contents in files.items():
            for kind, tensor in contents.items():
                if not all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(FINITE_AT_ONCE)):
                    what = f"the {kind} state holds" if contents is tensors else f"{file} would hold"
                    raise ValueError(f"{what} values that are not finite; it is not saved")
        fault.point("checkpoint.before_part")
        parts = []
        for file, contents in files.items():
            metadata = {"fragments": json.dumps(self._host.index)} if contents is tensors else {}
            size, digest = write_part(folder / file, contents, metadata)
            parts.append(Part(file=file, bytes=size, sha256=digest))
        fault.point("checkpoint.after_part")
        return parts

    def _finish(self, write: str, snapshot: Snapshot, reports: list[dict[str, Any]]) -> str | None:
        """Rank 0: commit and prune; returns what went wrong, or None."""
        problem = next((report["problem"] for report in reports if report["problem"] is not None), None)
        try:
            if problem is None:
                parts = [Part.model_validate(part) for report in reports for part in report["parts"]]
                steps = {int(group): value for report in reports for group, value in report["adam_steps"].items()}
                problem = self.store.publish(write, self._commit(snapshot, parts, steps))
            if problem is not None:
                self.store.discard(write)
                return str(problem)
        except Exception as error:  # noqa: BLE001 - as above
            return f"rank 0: {_said(error)}"
        try:
            self.store.prune(self.keep)
        except (OSError, ArdistError) as error:  # the checkpoint is good all the same; the next one prunes again
            events.count("checkpoint.prune_failed", step=snapshot.step, reason=error)
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
