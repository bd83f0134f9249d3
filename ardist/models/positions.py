"""Where a token stands: rotary angles over two axes or one, and the fixed sine/cosine table of the released layout.

Rotary pairs are half-split: channel j turns together with channel j + d/2. (Interleaved pairs differ by a permutation
of a head's channels that leaves every q·k as it is; `ardist.models.released` applies it to imported weights.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RELEASED_THETA = 1e4


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs of a head that turn with the frame axis, with the token axis, and with neither."""
    pairs = head_dim // 2
    frame, token = pairs // 2, pairs // 4
    return frame, token, pairs - frame - token


def axial_rotation(
    frames: tuple[int, int],
    tokens_per_frame: int,
    context_tokens: int,
    head_dim: int,
    theta: float,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "2 n 2 1 d"]:
    """Rotary tables of ``[context ; frames]`` over a frame axis and a token axis, in fp32.

    The first axis holds the cosines and the signed sines of `rotate`, the third query and key. A dot product of two
    video tokens depends on the differences of their frames and of their tokens only, so any number of frames works
    and far frames are related as near ones are. Context tokens have no place in time: their keys keep only the
    channels that do not turn, so that what a frame reads from the context does not depend on the frame's number.
    """
    frame_pairs, token_pairs, free_pairs = axis_pairs(head_dim)
    frame = torch.arange(*frames, device=device, dtype=torch.float32)
    token = torch.arange(tokens_per_frame, device=device, dtype=torch.float32)
    angles = torch.zeros(len(frame), tokens_per_frame, head_dim // 2, device=device)
    angles[..., :frame_pairs] = (frame[:, None] * _frequencies(frame_pairs, theta, device))[:, None]
    angles[..., frame_pairs : frame_pairs + token_pairs] = token[:, None] * _frequencies(token_pairs, theta, device)
    video = _tables(angles.flatten(0, 1))
    if not context_tokens:
        return video
    context = _tables(angles.new_zeros(context_tokens, head_dim // 2))
    for half in context[0, :, 1].chunk(2, dim=-1):
        half[..., : head_dim // 2 - free_pairs] = 0
    return torch.cat([context, video], dim=1)


def sequence_rotation(
    first: int, length: int, head_dim: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "2 n 2 1 d"]:
    """Rotary tables over one axis, the index in the whole sequence, context included (released variant), in fp32."""
    index = torch.arange(first, first + length, device=device, dtype=torch.float32)
    angles = index[:, None] * _frequencies(head_dim // 2, RELEASED_THETA, device)
    return _tables(angles)


def _tables(angles: Float[Tensor, "n p"]) -> Float[Tensor, "2 n 2 1 d"]:
    """``[cos, cos]`` and ``[-sin, sin]`` over the channels of a head, alike for queries and keys."""
    cos, sin = angles.cos(), angles.sin()
    tables = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
    return tables[:, :, None, None].repeat(1, 1, 2, 1, 1)


def _frequencies(count: int, theta: float, device: torch.device | str) -> Float[Tensor, "p"]:
    """``theta ** (-j / count)`` for j = 0..count-1, in radians per position."""
    return theta ** (-torch.arange(count, device=device, dtype=torch.float32) / max(count, 1))


def rotate(x: Float[Tensor, "b n 2 h d"], rotation: Float[Tensor, "2 n 2 1 d"]) -> Float[Tensor, "b n 2 h d"]:
    """Turn queries and keys by their tables; computed in fp32 and returned in the dtype of `x`."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    return (swapped * rotation[1]).add_(x * rotation[0]).to(x.dtype)


def sincos_table(length: int, width: int) -> Float[Tensor, "n w"]:
    """Fixed table over the flattened index: sines of ``i * 1e4**(-2j/width)``, then the cosines; derived in fp64."""
    rates = 1e4 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
