"""Context tokens from a file: what a context-conditional denoiser is told about the videos it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ardist.config.denoiser import DenoiserConfig
from ardist.errors import DataError, InvalidValueError

SUFFIXES = (".npy", ".safetensors")
NAME = "context"
"""The tensor that is read from a safetensors file with several."""


def read_context(path: Path, config: DenoiserConfig, num_videos: int) -> Float[Tensor, "n k d"]:
    """Context tokens in fp32 for `num_videos` videos, one set for all of them or one for each.

    The file holds [k, d], [1, k, d] or [num_videos, k, d] finite floating-point numbers, as ``.npy`` or as
    ``.safetensors`` with one tensor or one of the name ``context``.

    Raises:
        InvalidValueError: the denoiser takes no context, or the name or shape is not a legal one.
        DataError: the file cannot be read, or holds something else than finite numbers.
    """
    if not config.context_tokens:
        raise InvalidValueError(f"context={str(path)!r} is illegal: the bundle's denoiser has no context; legal: none")
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidValueError(f"context={str(path)!r} is illegal; legal: a name that ends in {' or '.join(SUFFIXES)}")
    tokens = _read_npy(path) if path.suffix.lower() == ".npy" else _read_safetensors(path)
    if not tokens.is_floating_point():
        raise DataError(f"the context {str(path)!r} holds {tokens.dtype}; legal: floating-point numbers")
    size = (config.context_tokens, config.context_dim)
    legal = [size, *((count, *size) for count in sorted({1, num_videos}))]
    if tuple(tokens.shape) not in legal:
        raise InvalidValueError(
            f"the context {str(path)!r} has shape {tuple(tokens.shape)}; legal: {' or '.join(map(str, legal))}"
        )
    if not tokens.isfinite().all():
        raise DataError(f"the context {str(path)!r} holds values that are not finite")
    return tokens.float().expand(num_videos, *size)


def _read_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(f"cannot read the context {str(path)!r}: {error}") from None


def _read_safetensors(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the context {str(path)!r}: {error}") from None
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if NAME not in tensors:
        raise DataError(f"the context {str(path)!r} holds {sorted(tensors)}; legal: one tensor, or one named {NAME!r}")
    return tensors[NAME]
