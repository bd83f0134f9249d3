"""The state of a run: what a checkpoint holds besides tensors, and how a run begins, continues and goes back."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ardist.errors import CheckpointError, ConfigError
from ardist.events import events
from ardist.models.weights import CONFIG_FILE
from ardist.storage import is_remote
from ardist.training import commit as commits
from ardist.training import resume, rollbacks
from ardist.training.checkpoint import Snapshot
from ardist.training.initial import bundle_weights, fill
from ardist.training.object_store import ObjectStore, staging_folder
from ardist.training.preflight import identity_problems
from ardist.training.store import CheckpointStore, FolderStore, parts_problem
from ardist.training.window import Window

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

_log = logging.getLogger("ardist.training")


@dataclass
class History:
    """Totals over all sessions of a run. Useful time is that of steps which are part of the result; samples are those
    of all steps, the skipped ones too; for blocked seconds the loop stood still for a checkpoint. `skipped_in_row`:
    steps skipped one after another up to the present one; `went_back_from`: the step from which the run last returned
    to a checkpoint; `good_steps_since`: steps made behind it; `rollbacks`: how often it returned."""

    skipped_steps: int = 0
    samples: int = 0
    useful_seconds: float = 0.0
    blocked_seconds: float = 0.0
    sessions: int = 1
    skipped_in_row: int = 0
    rollbacks: int = 0
    went_back_from: int | None = None
    good_steps_since: int = 0
    earlier_seconds: float = 0.0
    earlier_events: dict[str, int] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    def wall_seconds(self) -> float:
        """Time of all sessions from their start, in seconds."""
        return self.earlier_seconds + time.monotonic() - self._began

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "skipped_steps": self.skipped_steps,
            "samples": self.samples,
            "useful_seconds": self.useful_seconds,
            "blocked_seconds": self.blocked_seconds,
            "wall_seconds": self.wall_seconds(),
            "sessions": self.sessions,
            "skipped_in_row": self.skipped_in_row,
            "rollbacks": self.rollbacks,
            "went_back_from": self.went_back_from,
            "good_steps_since": self.good_steps_since,
            "events": dict(Counter(self.earlier_events) + Counter(events.snapshot())),
        }

    def made_good_step(self, step: int) -> None:
        """Step `step` was made; it counts when the run has not been that far before it went back."""
        if self.went_back_from is not None and step > self.went_back_from:
            self.good_steps_since += 1

    def went_back(self, step: int) -> None:
        """The run returned from step `step` to a checkpoint."""
        self.went_back_from, self.good_steps_since = step, 0
        self.skipped_in_row = 0
        self.rollbacks += 1

    def continue_from(self, saved: Mapping[str, Any]) -> None:
        """Add to the totals of an earlier session."""
        self.skipped_steps = int(saved["skipped_steps"])
        self.useful_seconds = float(saved["useful_seconds"])
        self.blocked_seconds = float(saved.get("blocked_seconds", 0.0))  # not counted by older versions
        self.sessions = int(saved["sessions"]) + 1
        # Older versions did not know of these.
        self.skipped_in_row = int(saved.get("skipped_in_row", 0))
        self.rollbacks = int(saved.get("rollbacks", 0))
        self.went_back_from = saved.get("went_back_from")
        self.good_steps_since = int(saved.get("good_steps_since", 0))
        self.earlier_seconds = float(saved["wall_seconds"])
        self.earlier_events = dict(saved["events"])


def snapshot(trainer: Trainer) -> Snapshot:
    """What a checkpoint of the present step holds besides the tensors."""
    config = trainer.config
    return Snapshot(
        step=trainer.step,
        config=config.model_dump(mode="json"),
        config_digest=config.digest(),
        manifest_digest=trainer.data.digest,
        zero_stage=config.training.zero_stage,
        precision=config.training.precision,
        state={
            "data": trainer.loader.state_dict(),
            "counters": trainer.engine.counters(),
            "loss_scaler": trainer.engine.loss_scale.state(),
            "spikes": {} if trainer.engine.spikes is None else trainer.engine.spikes.state(),
            "history": trainer.history.as_dict(),
            "dataset": trainer.data.describe(),
        },
    )


def resume_or_begin(trainer: Trainer) -> None:
    """Continue from the newest good checkpoint of the run directory; without one begin, perhaps with given weights."""
    found = resume.find(trainer.store, trainer.world)
    if found is not None:
        path, commit = found
        problems = list(identity_problems(commit, trainer.config))
        if problems:
            raise ConfigError("\n".join(problems))
        _restore(trainer, path, commit)
        trainer.history.continue_from(rollbacks.newer(trainer.run.rollback, commit.state["history"], trainer.world))
        if trainer.world.is_main:
            _say_resumed(trainer, path, commit)
        return
    if trainer.world.is_main:
        rollbacks.forget(trainer.run.rollback)
    source = trainer.config.init_from
    if source is not None and (Path(source).expanduser() / CONFIG_FILE).is_file():
        _init_from_bundle(trainer, Path(source).expanduser())
    elif source is not None:
        _init_from(trainer, source)
    if trainer.ema is not None:
        trainer.ema.restart()


def roll_back(trainer: Trainer) -> bool:
    """Return to the newest good checkpoint, data position included; False when there is none (collective).

    That the run went back is in its directory before anything else happens: a run that is killed before its next
    checkpoint knows of it too.
    """
    trainer.writer.wait()
    found = resume.find(trainer.store, trainer.world)
    if found is None:
        return False
    if trainer.world.is_main:
        events.count("training.rollback", from_step=trainer.step, to_step=found[1].step)
    trainer.history.went_back(trainer.step)
    if trainer.world.is_main:
        rollbacks.record(trainer.run.rollback, trainer.history.as_dict())
    _restore(trainer, *found)
    trainer.window = Window(trainer.window.longest)
    trainer.history.useful_seconds = float(found[1].state["history"]["useful_seconds"])
    return True


def _restore(trainer: Trainer, path: Path, commit: commits.Commit) -> None:
    resume.restore(path, commit, trainer.engine.fragments, trainer.ema)
    if trainer.adversary is not None:
        trainer.adversary.restore(path, [part.file for part in commit.parts])
    trainer.loader.load_state_dict(commit.state["data"])
    trainer.step = commit.step
    # Checkpoints of before this was counted had one batch size.
    batch = commit.config.get("training", {}).get("global_batch_size", 0)
    trainer.history.samples = int(commit.state["history"].get("samples", commit.step * batch))
    trainer.engine.set_counters(commit.state["counters"], commit.step)
    trainer.engine.loss_scale.load_state(commit.state["loss_scaler"])
    if trainer.engine.spikes is not None:
        trainer.engine.spikes.load_state(commit.state.get("spikes", {}))
    trainer.writer.last_saved = commit.step
    if trainer.world.is_main:
        resume.set_aside_newer(trainer.store, commit.step)
    trainer.store.release(path, trainer.world)
    trainer.world.barrier()


def _init_from(trainer: Trainer, source: str) -> None:
    store, found = _weights_source(trainer, source)
    if found is None:
        raise CheckpointError(f"init_from: {source}: it holds no checkpoint")
    path, commit = found
    kind = resume.weights_kind(commit, trainer.config.init_weights)
    resume.load_weights(path, commit, trainer.engine.fragments, kind)
    store.release(path, trainer.world)
    if trainer.world.is_main:
        _log.info("started from the %s weights of %s", kind, store.show(commit.step))


def _weights_source(trainer: Trainer, source: str) -> tuple[CheckpointStore, tuple[Path, commits.Commit] | None]:
    """The checkpoint that ``init_from`` means: of a run, of a folder or s3:// prefix of checkpoints, or one itself."""
    if is_remote(source):
        remote = ObjectStore(source, staging_folder(trainer.config.checkpoint, trainer.run.checkpoints))
        return remote, resume.find(remote, trainer.world)
    root = Path(source).expanduser()
    root = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    if not (root / commits.COMMIT).exists():
        return FolderStore(root), resume.find(root, trainer.world)
    commit = commits.read_commit(root)
    problem = parts_problem(root, commit, trainer.world)
    if problem is not None:
        raise CheckpointError(f"init_from: {root}: {problem}")
    return FolderStore(root.parent), (root, commit)


def _init_from_bundle(trainer: Trainer, bundle: Path) -> None:
    weights = bundle_weights(bundle, trainer.config.task, trainer.config.init_weights)
    fill(weights, trainer.engine.fragments)
    if trainer.world.is_main:
        _log.info("started from the weights of the bundle %s", bundle)


def _say_resumed(trainer: Trainer, path: Path, commit: commits.Commit) -> None:
    ranks = f"{commit.world_size} ranks at ZeRO stage {commit.zero_stage}"
    _log.info("resumed after step %d from %s, saved by %s", commit.step, path, ranks)
    if commit.config_digest != trainer.config.digest():
        changes = differences(commit.config, trainer.config.model_dump(mode="json"))
        _log.info("settings changed since then: %s", changes)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> str:
    """``training.steps 100 -> 200, …`` between two configurations."""
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines.append(differences(old, new, f"{prefix}{name}."))
        elif old != new:
            lines.append(f"{prefix}{name} {old!r} -> {new!r}")
    return ", ".join(filter(None, lines))
