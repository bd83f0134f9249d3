"""Where DeepSpeed keeps the training state, as fragments of named parameters: the same view for every ZeRO stage.

This is the only module that reads DeepSpeed's private attributes. A *run* is a contiguous stretch of one fp32
optimiser tensor; its *fragments* say which elements of which parameter lie in it. Checkpoints and EMA are written in
terms of fragments, so neither depends on the stage or on the number of ranks. `self_check` compares the view with
DeepSpeed's own gather at start-up, because private attributes may change between DeepSpeed versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ardist.errors import HardwareError
from ardist.training.distributed import World
from ardist.training.frozen import FrozenWeights

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """Elements [start, start + length) of the flattened parameter `name`, at `offset` of the run's stretch."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True, eq=False)
class Run:
    """Elements [start, start + length) of `key`, the tensor that indexes the optimiser's state, in group `group`."""

    key: torch.Tensor
    start: int
    length: int
    group: int
    fragments: tuple[Fragment, ...]

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """This run's stretch of a tensor that is laid out like `key` (the fp32 master weights or a moment)."""
        return tensor.detach().view(-1).narrow(0, self.start, self.length)


class Fragments:
    """The fragment view of one DeepSpeed engine.

    `held`: every run this rank keeps. `owned`: the runs this rank saves and keeps an EMA of; over all ranks they
    tile each parameter exactly once. With ZeRO 1-3 the two are the same; with stage 0 each rank owns its 1/world.
    """

    def __init__(self, engine: Any, world: World, frozen: FrozenWeights | None = None) -> None:
        self.engine = engine
        self.frozen = frozen or FrozenWeights(engine.module, rounded=False, main=world.is_main)
        self.world = world
        self.optimizer = engine.basic_optimizer
        self.kind = _kind(engine)
        self.replicated = self.kind in ("plain", "unfused")
        self.shapes: dict[str, list[int]] = {
            name: list(getattr(parameter, "ds_shape", parameter.shape))
            for parameter, name in engine.param_names.items()
            if parameter.requires_grad
        }
        self.held = list(_held_runs(engine, self.kind))
        self.owned = _slice_of(self.held, world.rank, world.size) if self.replicated else self.held

    def master(self, run: Run) -> torch.Tensor:
        """fp32 master weights of a run (a view)."""
        return run.within(run.key)

    def moment(self, run: Run, kind: str) -> torch.Tensor:
        """One Adam moment of a run (a view); the state must exist."""
        return run.within(self.optimizer.state[run.key][kind])

    def has_moments(self) -> bool:
        """False before the first optimiser step, when Adam has no state yet."""
        return all(MOMENTS[0] in self.optimizer.state.get(run.key, {}) for run in self.held)

    def create_moments(self) -> None:
        """Create Adam's state where it does not exist: zero moments and step 0, of the types Adam itself would use."""
        for run in self.held:
            state = self.optimizer.state[run.key]
            if MOMENTS[0] in state:
                continue
            group = self.optimizer.param_groups[run.group]
            on_device = bool(group.get("fused") or group.get("capturable"))
            state["step"] = (
                torch.zeros((), dtype=torch.float32, device=run.key.device if on_device else "cpu")
                if isinstance(self.optimizer, torch.optim.AdamW)
                else 0
            )
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(run.key.detach(), dtype=torch.float32)

    def drop_moments(self) -> None:
        """Forget Adam's state, as before the first step."""
        for run in self.held:
            self.optimizer.state.pop(run.key, None)

    def steps(self) -> dict[int, float]:
        """Adam's step count of each parameter group this rank holds a part of (reads the device)."""
        return {
            run.group: float(self.optimizer.state[run.key]["step"])
            for run in self.held
            if run.fragments and "step" in self.optimizer.state.get(run.key, {})
        }

    def set_steps(self, steps: dict[int, float]) -> None:
        """Set Adam's step count of each parameter group."""
        for run in self.held:
            state = self.optimizer.state[run.key]
            value = steps.get(run.group, 0.0)
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(value)
            else:
                state["step"] = int(value)

    @torch.no_grad()
    def refresh_working_weights(self) -> None:
        """Make the weights of the forward pass those of the fp32 masters, on every rank (collective)."""
        optimizer = self.engine.optimizer
        if self.kind in ("partitioned", "bf16_optimizer"):
            optimizer.update_lp_params()
        elif self.kind == "stage3":
            optimizer.checkpoint_event_prologue()  # give back whatever is gathered at the moment
            pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
            for working, master in pairs:
                working.data.copy_(master.data)
            optimizer.checkpoint_event_epilogue()  # and gather the persistent small parameters again
        elif self.kind == "unfused":
            for working_group, master_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                torch._foreach_copy_([weight.data for weight in working_group], list(master_group))

    @torch.no_grad()
    def prepare_fresh(self) -> None:
        """Undo what DeepSpeed leaves behind at construction.

        Stage 0 in bf16 or fp16 has already made one AdamW step on dummy gradients, with weight decay; ZeRO-3 pads
        partitions with uninitialised memory, which must reach neither a norm nor an EMA.
        """
        if self.kind == "unfused":
            self.engine.optimizer.refresh_fp32_params()
            self.drop_moments()
            self.create_moments()
        for run in self.held:
            padding = torch.ones(run.length, dtype=torch.bool, device=run.key.device)
            for fragment in run.fragments:
                padding[fragment.offset : fragment.offset + fragment.length] = False
            self.master(run)[padding] = 0.0

    def gradients(self) -> tuple[list[torch.Tensor], bool]:
        """This rank's gradients just before the optimiser step, and whether their squares still have to be summed
        over ranks. Not for ZeRO-3, whose own check cannot be switched off."""
        optimizer = self.engine.optimizer
        if self.kind in ("plain", "unfused"):
            groups = (
                optimizer.fp16_groups
                if self.kind == "unfused"
                else [group["params"] for group in optimizer.param_groups]
            )
            return [weight.grad for group in groups for weight in group if weight.grad is not None], False
        if self.kind == "bf16_optimizer":
            return list(optimizer.fp32_groups_gradient_flat_partition), True
        gradients = optimizer.averaged_gradients.values()
        return [part for group in gradients if group for part in group if part is not None], True

    def grad_norm(self) -> torch.Tensor | float:
        """The global gradient norm that DeepSpeed measured in the step under way, before clipping."""
        norm: torch.Tensor | float = self.engine.optimizer._global_grad_norm
        return norm

    @torch.no_grad()
    def exchange(self, buffers: list[torch.Tensor]) -> None:
        """Swap the masters of the owned runs with `buffers`, bit for bit, and refresh the working weights
        (collective). Calling it twice restores the first state."""
        for run, buffer in zip(self.owned, buffers, strict=True):
            master = self.master(run)
            kept = master.clone()
            master.copy_(buffer)
            buffer.copy_(kept)
        if self.replicated and self.world.size > 1:
            self._share_owned_slices()
        self.refresh_working_weights()

    @torch.no_grad()
    def whole(self, stretches: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trained parameter whole, one after another, from tensors laid out like the owned runs (collective)."""
        mine: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in self.shapes}
        for run, stretch in zip(self.owned, stretches, strict=True):
            for fragment in run.fragments:
                piece = stretch.narrow(0, fragment.offset, fragment.length)
                mine[fragment.name].append((fragment.start, piece))
        for name, shape in self.shapes.items():
            full = torch.zeros(math.prod(shape), device=self.world.device)
            for start, piece in mine[name]:
                full[start : start + len(piece)] = piece
            if self.world.size > 1:
                dist.all_reduce(full)  # the ranks' pieces do not overlap, so the sum of them is exact
            yield name, full.view(shape)

    def _share_owned_slices(self) -> None:
        """Stage 0: every rank takes the other ranks' slices (they tile the parameters, so a sum of zeros is exact)."""
        owned = {id(run.key): run for run in self.owned}
        for run in self.held:
            whole, mine = run.key.detach().view(-1), owned.get(id(run.key))
            if mine is None:
                whole.zero_()
            else:
                whole[: mine.start] = 0
                whole[mine.start + mine.length :] = 0
            dist.all_reduce(whole)

    def self_check(self) -> None:
        """Refuse to go on when the view does not describe this DeepSpeed version (collective).

        The owned fragments of all ranks must tile every parameter, and for one parameter the masters seen through
        them must equal DeepSpeed's own gather.
        """
        counts: dict[str, int] = dict.fromkeys(self.shapes, 0)
        for run in self.owned:
            for fragment in run.fragments:
                counts[fragment.name] += fragment.length
        for other in self.world.all_gather(counts if self.world.rank else {}):
            for name, count in other.items():
                counts[name] += count
        problem = None
        if self.world.is_main:
            short = [name for name, shape in self.shapes.items() if counts[name] != math.prod(shape)]
            if short:
                problem = f"the optimiser's fragments do not cover {short[:3]}"
        problem = self.world.broadcast(problem) or self._compare_smallest()
        if problem:
            import deepspeed

            raise HardwareError(
                f"DeepSpeed {deepspeed.__version__} keeps its state in another way than the versions this release "
                f"was made for (0.19.8): {problem}. Install deepspeed==0.19.8."
            )

    def _compare_smallest(self) -> str | None:
        if self.replicated:
            return None
        from deepspeed.utils import safe_get_full_fp32_param

        parameter, name = min(
            ((p, n) for p, n in self.engine.param_names.items() if n in self.shapes),
            key=lambda pair: math.prod(self.shapes[pair[1]]),
        )
        full = safe_get_full_fp32_param(parameter)
        differs = full is None
        for run in self.owned:
            for fragment in run.fragments:
                if fragment.name == name and full is not None:
                    mine = self.master(run)[fragment.offset : fragment.offset + fragment.length]
                    theirs = full.view(-1)[fragment.start : fragment.start + fragment.length]
                    differs |= not torch.equal(mine.cpu(), theirs.to(mine.dtype).cpu())
        bad = [rank for rank, wrong in enumerate(self.world.all_gather(differs)) if wrong]
        return f"the master weights of {name!r} differ from DeepSpeed's own on ranks {bad}" if bad else None


def _kind(engine: Any) -> str:
    stage = engine.zero_optimization_stage()
    name = type(engine.optimizer).__name__
    if stage == 3:
        return "stage3"
    if stage in (1, 2):
        return "bf16_optimizer" if name == "BF16_Optimizer" else "partitioned"
    return "unfused" if name == "FP16_UnfusedOptimizer" else "plain"


def _held_runs(engine: Any, kind: str) -> Iterator[Run]:
    readers: dict[str, Callable[[Any], Iterator[Run]]] = {
        "partitioned": _flat_partitions,
        "bf16_optimizer": _flat_partitions,
        "stage3": _stage3_partitions,
        "unfused": _whole_parameters,
        "plain": _whole_parameters,
    }
    return readers[kind](engine)


def _flat_partitions(engine: Any) -> Iterator[Run]:
    """Stages 1 and 2: one flat fp32 partition per parameter group."""
    optimizer, names = engine.optimizer, engine.param_names
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    else:
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    for index, (flat, parameters) in enumerate(zip(flats, groups, strict=True)):
        fragments = tuple(
            Fragment(
                names[parameter],
                mapping.lp_fragment_address.start,
                mapping.lp_fragment_address.numel,
                mapping.hp_fragment_address.start,
            )
            for parameter in parameters
            if (mapping := parameter._hp_mapping) is not None  # None: nothing of it lies on this rank
        )
        yield Run(flat, 0, flat.numel(), index, fragments)


def _stage3_partitions(engine: Any) -> Iterator[Run]:
    """Stage 3: each parameter is cut into equal parts, the last one padded; sub-groups are flat."""
    optimizer, names = engine.optimizer, engine.param_names
    for index, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[index]
        fragments = []
        for parameter in parameters:
            _, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = optimizer._get_param_partition_rank(parameter) * part
            length = min(part, parameter.ds_numel - start)
            if length > 0:
                fragments.append(Fragment(names[parameter], start, length, offset))
        yield Run(flat, 0, flat.numel(), optimizer.sub_group_to_group_id[index], tuple(fragments))


def _whole_parameters(engine: Any) -> Iterator[Run]:
    """Stage 0: whole parameters on every rank; with 16-bit weights the masters are tensors of their own."""
    optimizer, names = engine.optimizer, engine.param_names
    if hasattr(optimizer, "fp16_groups"):
        working_groups, master_groups = optimizer.fp16_groups, optimizer.fp32_groups
    else:
        working_groups = master_groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    for index, (working, masters) in enumerate(zip(working_groups, master_groups, strict=True)):
        for parameter, master in zip(working, masters, strict=True):
            size = master.numel()
            yield Run(master, 0, size, index, (Fragment(names[parameter], 0, size, 0),))


def _slice_of(runs: list[Run], rank: int, size: int) -> list[Run]:
    """Rank `rank`'s share of runs that hold one whole parameter each."""
    total = sum(run.length for run in runs)
    low, high = total * rank // size, total * (rank + 1) // size
    owned, position = [], 0
    for run in runs:
        first, last = max(low, position), min(high, position + run.length)
        if first < last:
            start = first - position
            fragment = Fragment(run.fragments[0].name, start, last - first, 0)
            owned.append(Run(run.key, start, last - first, run.group, (fragment,)))
        position += run.length
    return owned
