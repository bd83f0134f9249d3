"""Randomness without state: every value is a function of (seed, epoch, sample id, purpose, index).

The generator is Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011). Its 64-bit key
and 128-bit counter hold the whole address of a value, field by field, so two different addresses never share a block:

    key      word 0, 1   seed, low and high half         0 <= seed  < 2^63
    counter  word 0      block: index of four words      0 <= block < 2^32
             word 1      epoch << 8 | purpose            0 <= epoch < 2^24, 0 <= purpose < 256
             word 2, 3   sample id, low and high half    any 64 bits

All arithmetic that could round differently from one device or compiler to the next is done in integers, so a value has
the same bits on CPU and GPU, eager and compiled, alone or in any batch. The layout and the constants are frozen: a
checkpoint means the same noise for ever. Every function runs without a host sync on the device of `sample_ids`.
"""

from __future__ import annotations

import enum
import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ardist.diffusion.philox_host import philox4x32_host
from ardist.errors import InvalidValueError


class Purpose(enum.IntEnum):
    """What a random value is for. Numbers are part of the frozen layout: add new ones, never change old ones."""

    NOISE = 1
    TIMESTEPS = 2
    LAW = 3
    CONDITION_DROPOUT = 4
    FLIP = 5
    POSTERIOR = 6
    FRAME_CHOICE = 7
    SAMPLER_NOISE = 8
    VALIDATION = 9
    SHIFT = 10
    COLOUR = 11
    LATENT_NOISE = 12
    LATENT_NOISE_AMOUNT = 13


_WORD = 0xFFFFFFFF
# The multipliers M exceed 2^31, so M * x would leave int64. (M - 2^32) * x does not, and has the same low 32 bits.
_M0, _M1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

HOST_BLOCKS = 2**14
"""Draws on a CPU of up to so many blocks go through NumPy: same bits, less time."""


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four counter words (int64 tensors of 32-bit values that broadcast) under a two-word key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        # M * x = p + 2^32 x, hence its high word is floor(p / 2^32) + x.
        c0, c1, c2, c3 = ((p1 >> 32) + c2) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) + c0) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def random_bits(
    seed: int, epoch: int, sample_ids: Int64[Tensor, " b"], purpose: int, count: int, *, offset: int = 0
) -> Int64[Tensor, "b count"]:
    """Words `offset .. offset+count-1` of each sample's stream, each in [0, 2^32), as int64 `[b, count]`.

    `sample_ids` holds the bits of 64-bit sample keys. Raises InvalidValueError for ids of another type or shape, and
    for an address outside the layout.
    """
    check_sample_ids(sample_ids)
    _check_address(seed, epoch, purpose, count, offset)
    first, end = offset // 4, -(-(offset + count) // 4)
    if _is_small_and_here(sample_ids, end - first):
        return _host_blocks(seed, epoch << 8 | purpose, sample_ids, first, end)[:, offset - 4 * first :][:, :count]
    # The mask changes no value: it keeps a compiler from folding the index into Philox's first product, which would
    # then be computed in the 32 bits of index arithmetic.
    blocks = torch.arange(first, end, device=sample_ids.device).unsqueeze(0) & _WORD
    tag = torch.full((1, 1), epoch << 8 | purpose, dtype=torch.int64, device=sample_ids.device)
    ids = sample_ids.unsqueeze(1)
    words = philox4x32((blocks, tag, ids & _WORD, (ids >> 32) & _WORD), (seed & _WORD, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, offset - 4 * first :][:, :count]


def _host_blocks(seed: int, tag: int, sample_ids: Tensor, first: int, end: int) -> Tensor:
    """The words of the blocks [first, end) of each sample, int64 [b, 4 * (end - first)]."""
    ids = sample_ids.numpy().view(np.uint64)[:, None]
    numbers = np.arange(first, end, dtype=np.uint64)[None]
    tags = np.full((1, 1), tag, dtype=np.uint64)
    counter = (numbers, tags, ids & np.uint64(_WORD), ids >> np.uint64(32))
    return torch.from_numpy(philox4x32_host(counter, (seed & _WORD, seed >> 32)).view(np.int64)).flatten(1)


def _is_small_and_here(sample_ids: Tensor, blocks: int) -> bool:
    """Whether plain values on this CPU are asked for, in a number at which calls cost more than arithmetic."""
    plain = type(sample_ids) is Tensor and sample_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and 0 < blocks * len(sample_ids) <= HOST_BLOCKS


def uniform(
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, " b"],
    purpose: int,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
) -> Float[Tensor, "b ..."]:
    """Uniform values in [0, 1), multiples of 2^-24, `[b, *shape]`; `dtype` is float32 or float64.

    Value number i (row-major) comes from word `offset + i`. Narrower types are refused: they would round up to 1.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InvalidValueError(f"dtype={dtype} cannot hold 24-bit uniforms; legal: torch.float32, torch.float64")
    bits = random_bits(seed, epoch, sample_ids, purpose, math.prod(shape), offset=offset)
    return ((bits >> 8).to(dtype) * 2.0**-24).reshape(sample_ids.shape[0], *shape)


def normal(
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, " b"],
    purpose: int,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
) -> Float[Tensor, "b ..."]:
    """Standard normal values, `[b, *shape]`, by Box-Muller from word pairs; |value| < 6.77, error below 5e-7.

    Value number i (row-major) is value `offset + i` of the sample's stream, so a part of a long tensor (one frame,
    say) can be drawn alone. Rounded to float32 first, then to `dtype`.
    """
    count = math.prod(shape)
    first = offset // 2 * 2
    span = -(-(offset + count) // 2) * 2 - first
    pairs = random_bits(seed, epoch, sample_ids, purpose, span, offset=first).unflatten(1, (-1, 2))
    values = _box_muller(pairs[..., 0], pairs[..., 1])[:, offset - first :][:, :count]
    return values.to(dtype).reshape(sample_ids.shape[0], *shape)


def integers(
    seed: int,
    epoch: int,
    sample_ids: Int64[Tensor, " b"],
    purpose: int,
    shape: tuple[int, ...],
    low: int,
    high: int,
) -> Int64[Tensor, "b ..."]:
    """Integers uniform over [low, high), `[b, *shape]`; needs 1 <= high - low < 2^31."""
    if not 1 <= high - low < 2**31:
        raise InvalidValueError(f"low={low}, high={high}: high - low must be in 1..{2**31 - 1}")
    count = math.prod(shape)
    words = random_bits(seed, epoch, sample_ids, purpose, 2 * count).unflatten(1, (count, 2))
    return (scale_to_range(words, high - low) + low).reshape(sample_ids.shape[0], *shape)


def bernoulli(
    seed: int, epoch: int, sample_ids: Int64[Tensor, " b"], purpose: int, p: float | int
) -> Bool[Tensor, " b"]:
    """True with probability `p` in [0, 1] (rounded to a multiple of 2^-32), one value per sample."""
    if not 0 <= p <= 1:
        raise InvalidValueError(f"p={p} is no probability; legal: 0..1")
    return random_bits(seed, epoch, sample_ids, purpose, 1)[:, 0] < round(p * 2**32)


def scale_to_range(words: Int64[Tensor, "*n 2"], size: int | Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """floor(w * size / 2^64) of the 64-bit numbers w in `words` (high, low): uniform over 0..size-1, size < 2^31.

    Each outcome's probability is within 2^-64 of 1/size; `size` may be a tensor that broadcasts against the leading
    axes of `words`.
    """
    return (words[..., 0] * size + ((words[..., 1] * size) >> 32)) >> 32


def check_sample_ids(sample_ids: Tensor) -> None:
    """Raise InvalidValueError unless they are int64, one per sample: other types would be read as other addresses."""
    if sample_ids.ndim != 1 or sample_ids.dtype != torch.int64:
        raise InvalidValueError(
            f"sample_ids of shape {tuple(sample_ids.shape)} and {sample_ids.dtype} are illegal; "
            "legal: one axis, torch.int64"
        )


def _check_address(seed: int, epoch: int, purpose: int, count: int, offset: int) -> None:
    for name, value, bound in (("seed", seed, 63), ("epoch", epoch, 24), ("purpose", purpose, 8)):
        if not 0 <= value < 2**bound:
            raise InvalidValueError(f"{name}={value} is outside the random address space; legal: 0..2^{bound}-1")
    if count < 0 or offset < 0 or offset + count > 2**34:
        raise InvalidValueError(f"offset={offset}, count={count}: a sample has 2^34 words for one purpose")


# Fixed-point arithmetic. The coefficients have 30 fractional bits, lowest power first: least-squares fits at Chebyshev
# nodes, whose own error is below 1e-9.
_Q = 30
_LN2_Q46 = 48775896626292
# -log(1 - g/2) / g for 0 <= g <= 1; cos(pi/2 y) and sin(pi/2 y) / y in powers of y^2 for |y| <= 1/2
_LOG = (536870912, 134217657, 44741986, 16735943, 7026805, 1400848, 4980372, -5900905, 6963554, -3935903, 1159848)
_COS = (1073741824, -1324675869, 272375234, -22398330, 970265)
_SIN = (1686629713, -693598667, 85569259, -5026471, 169873)


def _polynomial(coefficients: tuple[int, ...], x: Tensor, fraction_bits: int) -> Tensor:
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value = ((value >> fraction_bits) + coefficient) * x
    return (value >> fraction_bits) + coefficients[0]


def _minus_log(word: Tensor) -> Tensor:
    """-log((2 word + 1) / 2^33) with 46 fractional bits, accurate relative to its size as it goes to 0."""
    # The float64 bits of an integer below 2^53 are its exponent and its mantissa, exactly.
    bits = (2 * word + 1).to(torch.float64).view(torch.int64)
    halvings = 1023 + 32 - (bits >> 52)
    gap = 2**32 - ((bits & (2**52 - 1)) >> 20)  # 2 - mantissa, 32 fractional bits
    return halvings * _LN2_Q46 + ((gap * _polynomial(_LOG, gap, 32)) >> 16)


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> Tensor:
    """`[b, n]` pairs of words -> `[b, 2n]` normals: sqrt(-2 log u) times (cos, sin) of a uniform angle, in float32.

    Everything is integer arithmetic, because floating-point libraries differ in their last bits: log, cos and sin
    between devices and between the vectorised body and the tail of one tensor, and on CPU even the square root is not
    correctly rounded. The float64 root below is only an estimate, which integers then correct.
    """
    energy = _minus_log(radius_word)
    square_radius = energy << 11  # -2 log u with 56 fractional bits
    radius = (energy.to(torch.float64) * 2.0**11).sqrt().to(torch.int64)
    radius = radius - (radius * radius > square_radius).to(torch.int64)
    radius = radius + ((radius + 1) * (radius + 1) <= square_radius).to(torch.int64)
    # The top two bits choose a quarter turn, the others the angle within it, from -1/2 to 1/2 of a quarter.
    quarter, y = angle_word >> 30, (angle_word & (2**_Q - 1)) - 2 ** (_Q - 1)
    square = (y * y) >> _Q
    cos, sin = _polynomial(_COS, square, _Q), (y * _polynomial(_SIN, square, _Q)) >> _Q
    odd, sign = (quarter & 1).bool(), 1 - (quarter & 2)
    direction = torch.stack((torch.where(odd, -sin, cos), torch.where(odd, cos, sin)), dim=-1) * sign.unsqueeze(-1)
    value = (radius.unsqueeze(-1) * direction) >> 10  # 28 + 30 - 10 fractional bits, below 2^51: exact in float64
    return (value.to(torch.float64) * 2.0**-48).to(torch.float32).flatten(-2)
