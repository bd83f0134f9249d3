"""What is done to a denoiser before training or sampling, in a fixed order: checkpointing, then compilation.

ZeRO comes after both and is the training engine's business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx.experimental._config as shape_config
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ardist.errors import choose
from ardist.models.denoiser import Denoiser
from ardist.models.denoiser.block import Block

CHECKPOINTING = ("none", "selective", "full")

_KEPT: list[Any] = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.ardist.attention.default,
    # What `sdpa` becomes on devices where it does not stand behind the operator above.
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def parallelize(
    model: Denoiser,
    *,
    activation_checkpointing: str = "none",
    compile: bool = False,
    backend: str = "inductor",
    dynamic: bool = True,
) -> Denoiser:
    """Change `model` in place and return it. Parameter names, and so checkpoints, stay as they are.

    Args:
        activation_checkpointing: ``none``; ``selective`` keeps the results of matrix products and of attention, and
            recomputes everything elementwise in the backward pass, and attention too where the backend is ``flex``;
            ``full`` keeps the input of each block only.
        compile: compile each block as one graph, and for cached inference the two halves around its attention call.
            All blocks share the compiled programs; another number of frames or clips does not recompile (see
            `dynamic`), except where attention is ``flex``, ``reference`` or, on a GPU, ``sdpa``: there the mask is a
            part of the program.
        backend: of ``torch.compile``.
        dynamic: programs for any number of frames and clips; False specialises them, with a recompilation per shape.

    Raises:
        InvalidValueError: the kind of checkpointing is unknown.
    """
    choose("activation_checkpointing", activation_checkpointing, CHECKPOINTING)
    if compile and dynamic:
        # Sizes that happen to be equal in the first call (16 clips of 16 frames) stay independent of each other.
        shape_config.use_duck_shape = False
        # Sizes 0 and 1 still have programs of their own: no context, one frame, one clip, with and without gradients.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    compiled = functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=dynamic)
    for block in model.blocks:
        assert isinstance(block, Block)
        whole: Callable[..., Any] = block.whole
        if activation_checkpointing == "selective":
            whole = functools.partial(checkpoint, whole, use_reentrant=False, context_fn=_keep_products)
        if compile:
            whole = compiled(whole)
            for half in ("before_attention", "after_attention"):
                setattr(block, half, compiled(getattr(block, half)))
        if activation_checkpointing == "full":
            whole = functools.partial(checkpoint, whole, use_reentrant=False)
        block.whole = whole  # type: ignore[method-assign]
    return model


def _keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_KEPT)
    return contexts
