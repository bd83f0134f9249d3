"""What the training loop needs to know about a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ardist.data.batch import Batch

Forward = Callable[..., Any]
"""A model's forward pass, be it the module itself or an engine around it."""

Inputs = dict[str, Tensor]
"""What a micro-batch is made of: tensors with one row per sample."""


class Objective(Protocol):
    """What the loop needs to know about a task."""

    flops_per_clip: float
    """0 where nobody has counted them."""
    tokens_per_clip: int

    def build_model(self) -> nn.Module:
        """The model in fp32 on the host, with activation checkpointing and compilation as configured."""

    def prepare(self, batch: Batch) -> Inputs:
        """All that is random about a rank's batch, drawn at once on the device, before it is cut."""

    def loss(self, forward: Forward, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, and detached numbers or vectors to average and log."""

    def evaluate(self, forward: Forward, clip: Batch) -> dict[str, list[float]]:
        """Held-out measures of one clip as flat lists; equal on every rank that computes them."""

    def summarise(self, clips: list[dict[str, list[float]]]) -> dict[str, Any]:
        """One validation record from the measures of all clips, in the data set's order."""

    def describe(self, sample_ids: Tensor, epoch: int, num_frames: int) -> dict[str, Any]:
        """What these samples were given in training, for the report of a bad step."""
