"""Weights that a fresh run starts from: those of a checkpoint or of a bundle, and new ones where stage 2 adds parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ardist.errors import CheckpointError
from ardist.models.weights import read_config, read_state
from ardist.training.commit import Commit
from ardist.training.fragments import Fragments
from ardist.training.parts import EXTRA_FILE, PartsReader, holds_fragments

ADDED_BY_STAGE_TWO = "decoder.temporal."
"""Parts of the AR-VAE that a stage-1 model does not have; they start as the identity."""


class Source(Protocol):
    """Where weights are read from, by name and stretch."""

    name: str
    shapes: dict[str, list[int]]

    def read_into(self, name: str, start: int, destination: Tensor) -> None:
        """Copy elements [start, start + n) of a flattened tensor into a flat one of n elements."""


class WholeTensors:
    """Tensors in memory, such as those of a bundle."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self.tensors = tensors
        self.shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}

    def read_into(self, name: str, start: int, destination: Tensor) -> None:
        """See `Source`."""
        destination.copy_(self.tensors[name].reshape(-1).narrow(0, start, destination.numel()))


class CheckpointWeights:
    """One kind of weights of a checkpoint, with what was frozen when it was written, and buffers."""

    def __init__(self, path: Path, commit: Commit, kind: str) -> None:
        self.name = str(path)
        self.kind = kind
        files = [part.file for part in commit.parts]
        self._reader = PartsReader(path, filter(holds_fragments, files), commit.shapes)
        if kind not in self._reader.kinds:
            raise CheckpointError(f"{path} holds no {kind!r}; it holds {sorted(self._reader.kinds)}")
        self._whole = WholeTensors(self.name, load_file(path / EXTRA_FILE) if EXTRA_FILE in files else {})
        self.shapes = {**self._whole.shapes, **self._reader.shapes}

    def read_into(self, name: str, start: int, destination: Tensor) -> None:
        """See `Source`."""
        if name in self._reader.shapes:
            self._reader.read_into(self.kind, name, start, destination)
        else:
            self._whole.read_into(name, start, destination)


def bundle_weights(directory: Path, task: str, wanted: str) -> WholeTensors:
    """The weights of an exported bundle; `wanted` is ``init_weights``: auto (the averaged ones) or raw."""
    if wanted not in ("auto", "raw"):
        raise CheckpointError(f"init_weights={wanted!r}: the bundle {directory} has auto (its average) and raw")
    file = f"{task}{'_raw' if wanted == 'raw' else ''}.safetensors"
    return WholeTensors(str(directory), read_state(directory, file, read_config(directory)))


@torch.no_grad()
def fill(source: Source, fragments: Fragments) -> None:
    """Give an engine of any layout the weights of `source`, trained and frozen ones and buffers (collective).

    Without temporal blocks in the source those of the model keep their start. Raises `CheckpointError` for every
    other difference in names and shapes.
    """
    module, frozen = fragments.engine.module, fragments.frozen
    kept = set(module.state_dict().keys())
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    wanted = {**fragments.shapes, **frozen.shapes, **{name: list(b.shape) for name, b in buffers.items()}}
    if not any(name.startswith(ADDED_BY_STAGE_TWO) for name in source.shapes):
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(ADDED_BY_STAGE_TWO)}
    difference = shape_difference(source.shapes, wanted)
    if difference:
        raise CheckpointError(f"{source.name} belongs to another model: {difference}")
    for run in fragments.held:
        target = fragments.master(run)
        for fragment in run.fragments:
            if fragment.name in wanted:
                stretch = target.narrow(0, fragment.offset, fragment.length)
                source.read_into(fragment.name, fragment.start, stretch)
    values = {name: torch.empty(frozen.shapes[name]) for name in frozen.shapes if name in wanted}
    for name, value in values.items():
        source.read_into(name, 0, value.view(-1))
    frozen.assign(values)
    for name, buffer in buffers.items():
        whole = torch.empty(buffer.shape, dtype=buffer.dtype)
        source.read_into(name, 0, whole.view(-1))
        buffer.copy_(whole)
    fragments.refresh_working_weights()


def shape_difference(saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> str:
    """First few differences between two sets of parameter shapes; empty when they are equal."""
    lines = [f"{name!r} is missing there" for name in wanted if name not in saved]
    lines += [f"{name!r} is not in this model" for name in saved if name not in wanted]
    lines += [
        f"{name!r} is {list(saved[name])} there and {list(shape)} here"
        for name, shape in wanted.items()
        if name in saved and list(saved[name]) != list(shape)
    ]
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
