"""What the functions of this package ask of their tensors' shapes and types: a tensor that broadcasts is no input.

Only what the host knows is looked at, so a check costs no synchronisation, and a compiler folds it into its guards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ardist.errors import InvalidValueError


def check_shape(name: str, tensor: Tensor, *legal: torch.Size) -> None:
    """Raise InvalidValueError, with the legal shapes, unless `tensor` has one of them exactly."""
    for shape in legal:
        if tensor.shape == shape:
            return
    shapes = " or ".join(str(tuple(shape)) for shape in legal)
    raise InvalidValueError(f"{name} of shape {tuple(tensor.shape)} is illegal; legal: {shapes}")


def check_clips(name: str, tensor: Tensor) -> None:
    """Raise InvalidValueError unless `tensor` has an axis of clips and one of frames; any others may follow."""
    if tensor.ndim < 2:
        raise InvalidValueError(f"{name} of shape {tuple(tensor.shape)} is illegal; legal: (clips, frames, ...)")


def check_int64(name: str, tensor: Tensor) -> None:
    """Raise InvalidValueError unless `tensor` holds int64."""
    if tensor.dtype != torch.int64:
        raise InvalidValueError(
            f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype} is illegal; legal: torch.int64"
        )
