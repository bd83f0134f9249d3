"""Memory of the forward and backward pass, measured on small copies of the real model instead of guessed.

The forward pass of one and two blocks over one and two clips is run on the host, and what is still alive at its end is
counted: that is what the backward pass waits for. The rest is a straight line: blocks are alike, and so are clips.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ardist.config import TrainConfig
from ardist.models.denoiser import Denoiser
from ardist.models.parallelize import CHECKPOINTING, parallelize


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made under it and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def activation_bytes(config: TrainConfig, num_frames: int, micro_batch_size: int) -> dict[str, int]:
    """Bytes that a micro-batch of the denoiser needs between its passes, without weights, by checkpointing mode.

    With checkpointing the block whose backward pass runs is there in full, besides what was kept of all blocks.
    """
    assert config.denoiser is not None
    lines = {mode: _line(config, num_frames, mode) for mode in CHECKPOINTING}
    plain = lines["none"][1]
    return {
        mode: micro_batch_size * (first + block * (config.denoiser.depth - 1) + max(0, plain - block))
        for mode, (first, block) in lines.items()
    }


def _line(config: TrainConfig, num_frames: int, checkpointing: str) -> tuple[int, int]:
    """Bytes per clip of a model with one block, and of every further block.

    Differences between clips: what is kept once per block, whatever the number of clips, belongs to the weights.
    """
    one, two = (
        kept_bytes(config, num_frames, depth, 2, checkpointing)
        - kept_bytes(config, num_frames, depth, 1, checkpointing)
        for depth in (1, 2)
    )
    return one, two - one


def kept_bytes(config: TrainConfig, num_frames: int, depth: int, clips: int, checkpointing: str) -> int:
    """Bytes alive after the forward pass of a denoiser of `depth` blocks over `clips` clips."""
    assert config.denoiser is not None
    shape = config.denoiser.model_copy(update={"depth": depth})
    dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    model = parallelize(Denoiser(shape), activation_checkpointing=checkpointing).to(dtype)
    latents = torch.zeros(clips, num_frames, shape.tokens_per_frame, shape.latent_channels)
    arguments: dict[str, Tensor] = {}
    if shape.context_tokens:
        arguments["context"] = torch.zeros(clips, shape.context_tokens, shape.context_dim)
    if shape.num_classes is not None:
        arguments["class_ids"] = torch.zeros(clips, dtype=torch.int64)
    timesteps = torch.zeros(clips, num_frames, dtype=torch.int64)
    with LiveBytes() as live:
        loss = (model(latents, timesteps, **arguments).float() - latents).square().mean()
        kept = int(live.now)
    del loss
    return kept
