"""FLOPs of training the AR-VAE, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ardist.config import ARVAEConfig
from ardist.models.ar_vae.model import ARVAE


def ar_vae_flops(
    config: ARVAEConfig,
    num_frames: int,
    size: tuple[int, int],
    choose_trainable: Callable[[ARVAE], None] | None = None,
) -> float:
    """FLOPs of one clip forward and backward: matrix products, convolutions and attention of the very graph.

    Run on the meta device, so nothing is computed. `choose_trainable` freezes what a stage does not train, whose
    gradients are then not counted. Losses and discriminator are left out, and so is recomputation.
    """
    with torch.device("meta"):
        model = ARVAE(config)
        frames = torch.empty(1, num_frames, 3, *size)
    if choose_trainable is not None:
        choose_trainable(model)
    with FlopCounterMode(display=False) as counter:
        reconstruction, _, _ = model(frames)
        reconstruction.sum().backward()
    return float(counter.get_total_flops())
