"""What a batch of videos is conditioned on, once or, for guidance, followed by the same batch without conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ardist.config.denoiser import DenoiserConfig
from ardist.errors import InvalidValueError
from ardist.models.denoiser import check_condition_shapes


@dataclass(frozen=True)
class Conditions:
    """Conditions of `num_copies` x `batch_size` network inputs, ``[conditional ; unconditional]`` when doubled."""

    batch_size: int
    num_copies: int
    context: Float[Tensor, "n k d"] | None
    context_dropped: Bool[Tensor, "n"] | None
    class_ids: Int64[Tensor, "n"] | None

    @classmethod
    def create(
        cls,
        config: DenoiserConfig,
        *,
        guided: bool,
        batch_size: int,
        sizes: Mapping[str, Tensor | None],
        context: Tensor | None,
        class_ids: Tensor | None,
        device: torch.device,
    ) -> Conditions:
        """Check that everything is about the same number of videos, and double it for guidance.

        Args:
            sizes: other arguments of the caller that have a batch axis, by name.

        Raises:
            InvalidValueError: batch sizes differ, a shape is not the denoiser's, guidance without condition, or a class
                id out of range.
        """
        given = {"context": context, "class_ids": class_ids, **sizes}
        # A scalar has no batch; the checks of shapes below say what it should be.
        counts = {name: value.shape[0] for name, value in given.items() if value is not None and value.ndim}
        if counts and batch_size == 1:
            batch_size = next(iter(counts.values()))
        if batch_size < 1 or any(count != batch_size for count in counts.values()):
            raise InvalidValueError(f"batch sizes differ: {counts}, batch_size={batch_size}; legal: one for all")
        if guided and context is None and class_ids is None:
            raise InvalidValueError("guidance_scale other than 1 needs a condition (context or class_ids); legal: 1")
        check_condition_shapes(config, batch_size, context, class_ids)
        if class_ids is not None and config.num_classes is not None:
            wrong = [int(value) for value in class_ids.flatten() if not 0 <= value <= config.num_classes]
            if wrong:
                raise InvalidValueError(
                    f"class_ids contains {wrong[0]}; legal: 0 to {config.num_classes - 1}, "
                    f"and {config.num_classes} for no class"
                )
        context_dropped = None
        if guided:
            if context is not None:
                context = torch.cat([context, context])
                context_dropped = torch.arange(2 * batch_size, device=device) >= batch_size
            if class_ids is not None and config.num_classes is not None:
                class_ids = torch.cat([class_ids, torch.full_like(class_ids, config.num_classes)])
        return cls(
            batch_size,
            2 if guided else 1,
            None if context is None else context.to(device),
            context_dropped,
            None if class_ids is None else class_ids.to(device),
        )

    def repeat(self, value: Tensor) -> Tensor:
        """`value` of the batch, once per copy."""
        return value if self.num_copies == 1 else torch.cat([value] * self.num_copies)
