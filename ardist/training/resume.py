"""Loading a checkpoint into any layout: every ZeRO stage and every number of ranks, without a conversion."""

from __future__ import annotations

from pathlib import Path

import torch

from ardist.errors import ArdistError, CheckpointError
from ardist.events import events
from ardist.training.commit import Commit
from ardist.training.distributed import World
from ardist.training.ema import ShardedEMA
from ardist.training.fragments import MOMENTS, Fragments
from ardist.training.initial import CheckpointWeights, fill, shape_difference
from ardist.training.parts import EXTRA_FILE, PartsReader, decay_text, holds_fragments
from ardist.training.store import CheckpointStore, FolderStore


def find(store: CheckpointStore | Path, world: World, step: int | None = None) -> tuple[Path, Commit] | None:
    """The newest checkpoint with a valid commit and undamaged parts, agreed by all ranks (collective): a folder with
    its parts, to be given back by `store.release`, and its commit; None if there is none at all.

    The ranks share the hashing. A bad candidate is counted, said, moved aside, and the one before is taken; when only
    bad ones exist, `CheckpointError`. With `step` only that one is looked at.
    """
    store = FolderStore(store) if isinstance(store, Path) else store
    steps = world.broadcast(store.steps() if world.is_main else None)
    rejected = []
    for candidate in steps if step is None else [step]:
        found, problem = inspect(store, candidate, world)
        if found is not None:
            return found
        rejected.append((store.show(candidate), problem))
        if world.is_main:
            events.count("checkpoint.fallback", path=store.show(candidate), reason=problem)
    if rejected:
        lines = "".join(f"\n  {name}: {problem}" for name, problem in rejected)
        raise CheckpointError(f"none of the checkpoints in {store.where} is readable:{lines}")
    return None


def inspect(store: CheckpointStore, step: int, world: World) -> tuple[tuple[Path, Commit] | None, str]:
    """A checkpoint's folder and commit if it and all parts are good, else None and what is wrong (collective)."""
    commit, problem = None, None
    try:
        commit = store.commit_of(step)
    except ArdistError as error:
        problem = str(error)
    problem = next(filter(None, world.all_gather(problem)), None)
    if commit is None or problem is not None:
        return None, str(problem)
    path, problem = store.fetch(step, commit, world)
    return (None, str(problem)) if path is None else ((path, commit), "")


def set_aside_newer(store: CheckpointStore, step: int) -> None:
    """Rank 0: put unreadable checkpoints newer than `step` aside, so that the run may write those steps again."""
    for newer in store.steps():
        if newer > step:
            store.set_aside(newer)


@torch.no_grad()
def restore(path: Path, commit: Commit, fragments: Fragments, ema: ShardedEMA | None) -> None:
    """Fill an engine of any layout from a checkpoint: masters, moments, step counts, EMA, buffers, working weights.

    Each rank reads only the bytes of its own fragments. Collective.
    """
    files = [part.file for part in commit.parts if holds_fragments(part.file)]
    reader = PartsReader(path, files, commit.shapes)
    _read_weights(reader, "master", fragments)
    if MOMENTS[0] in commit.kinds:
        fragments.create_moments()
        for run in fragments.held:
            for kind in MOMENTS:
                target = fragments.moment(run, kind)
                for fragment in run.fragments:
                    stretch = target.narrow(0, fragment.offset, fragment.length)
                    reader.read_into(kind, fragment.name, fragment.start, stretch)
        fragments.set_steps(commit.adam_steps)
    else:
        fragments.drop_moments()
    if ema is not None:
        missing = sorted(set(ema.decays) - set(commit.ema_decays))
        if missing:
            raise CheckpointError(
                f"{path} has no EMA of decay {missing}; it has {list(commit.ema_decays)}. Set training.ema_decays to "
                "those, or start a new run with init_from"
            )
        for decay, buffers in ema.buffers.items():
            for run, buffer in zip(fragments.owned, buffers, strict=True):
                for fragment in run.fragments:
                    stretch = buffer.narrow(0, fragment.offset, fragment.length)
                    reader.read_into(commit.kind_of_ema(decay), fragment.name, fragment.start, stretch)
        ema.set_updates(commit.ema_updates)
    _restore_extras(path, commit, fragments)
    fragments.refresh_working_weights()


@torch.no_grad()
def load_weights(path: Path, commit: Commit, fragments: Fragments, kind: str = "master") -> None:
    """Weights only (``init_from``): masters from the checkpoint's `kind`, no optimiser state. Collective."""
    fill(CheckpointWeights(path, commit, kind), fragments)


def _read_weights(reader: PartsReader, kind: str, fragments: Fragments) -> None:
    difference = shape_difference(reader.shapes, fragments.shapes)
    if difference:
        raise CheckpointError(f"{reader.directory} belongs to another model: {difference}")
    if kind not in reader.kinds:
        raise CheckpointError(f"{reader.directory} holds no {kind!r}; it holds {sorted(reader.kinds)}")
    for run in fragments.held:
        target = fragments.master(run)
        for fragment in run.fragments:
            stretch = target.narrow(0, fragment.offset, fragment.length)
            reader.read_into(kind, fragment.name, fragment.start, stretch)


def _restore_extras(path: Path, commit: Commit, fragments: Fragments) -> None:
    if not any(part.file == EXTRA_FILE for part in commit.parts):
        return
    from safetensors.torch import load_file

    values = load_file(path / EXTRA_FILE)
    buffers = dict(fragments.engine.module.named_buffers())
    frozen = {name: value for name, value in values.items() if name in fragments.frozen.shapes}
    for name in set(values) - set(frozen):
        if name not in buffers:
            raise CheckpointError(f"{path} holds {name!r}, which this model does not have")
        buffers[name].copy_(values[name])
    fragments.frozen.assign(frozen)


def weights_kind(commit: Commit, wanted: str) -> str:
    """The kind of state that ``init_weights`` means: auto (the largest EMA decay, else raw), raw, or a decay."""
    if wanted == "raw" or (wanted == "auto" and not commit.ema_decays):
        return "master"
    if wanted == "auto":
        return commit.kind_of_ema(max(commit.ema_decays))
    decay = float(wanted)
    if decay not in commit.ema_decays:
        names = ", ".join(["auto", "raw", *map(decay_text, commit.ema_decays)])
        raise CheckpointError(f"init_weights={wanted!r}: that checkpoint has {names}")
    return commit.kind_of_ema(decay)
