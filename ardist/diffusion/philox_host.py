"""Philox4x32-10 in NumPy, for small draws on a CPU.

A batch of timesteps needs a few thousand words. At that size a tensor operation is mostly the price of its call, and
the ten rounds are more than a hundred operations; NumPy's calls cost a third. The bits are those of
`ardist.diffusion.counter_rng.philox4x32`, which serves everything else: accelerators, compiled programs, large draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32_host(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> Words:
    """The four words of each block on a new last axis; counter words are 32-bit values that broadcast."""
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        high0, high1 = p0 >> _HALF, p1 >> _HALF
        high1 ^= c1
        high1 ^= np.uint64(k0)
        high0 ^= c3
        high0 ^= np.uint64(k1)
        p0 &= _LOW
        p1 &= _LOW
        c0, c1, c2, c3 = high1, p1, high0, p0
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)
