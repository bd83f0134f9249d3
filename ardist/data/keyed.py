"""Keyed 64-bit hashes and the permutations made of them: integers in, the same integers out, for ever.

A library's ``shuffle`` may change its stream between versions; a checkpoint must not. So the arithmetic is written
out here (the finaliser of SplitMix64, applied twice under a key) and pinned by known answers in the tests.
"""

from __future__ import annotations

import enum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = int | npt.NDArray[Any]
U64: TypeAlias = npt.NDArray[np.uint64]

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Domain(enum.IntEnum):
    """First word of a key, so that no two uses share a stream. Numbers never change."""

    BLOCKS = 1
    ROTATION = 2
    WINDOW = 3
    SUBSTITUTE = 4
    MIX = 5


def _mix(z: U64) -> U64:
    """SplitMix64's finaliser, a bijection of 64-bit words; overwrites its argument."""
    z ^= z >> _30
    z *= _FIRST
    z ^= z >> _27
    z *= _SECOND
    z ^= z >> _31
    return z


def _mix_one(z: int) -> int:
    """`_mix` of one word, where an array would cost more than the arithmetic."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def derive_key(domain: Domain, *words: Words) -> U64:
    """One 64-bit key (or one for each element, where a word is an array) out of a domain and integers."""
    key: int | U64 = _mix_one(int(domain) * _GOLDEN & _MASK)
    for place, word in enumerate(words, 2):
        salt = place * _GOLDEN & _MASK
        if isinstance(key, int) and isinstance(word, int):
            key = _mix_one(key ^ _mix_one((word + salt) & _MASK))
        else:
            key = _mix(_array(key) ^ _mix(_array(word) + np.uint64(salt)))
    return _array(key)


def _array(value: Words) -> U64:
    if isinstance(value, int):
        return np.array([value & _MASK], np.uint64)
    return np.atleast_1d(value).astype(np.uint64)


def hashes(key: U64, index: U64) -> U64:
    """Hash of every `index` under `key`; the two broadcast."""
    return _mix(_mix(index + key) ^ key)


def permutation(key: U64, n: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1 for one key, or [keys, n] for several: the argsort of hashes, ties by index."""
    table = hashes(key[:, None], np.arange(n, dtype=np.uint64)[None, :])
    order = np.argsort(table, axis=1, kind="stable")
    return order[0] if len(key) == 1 else order


def below(key: U64, n: int) -> int:
    """An integer in [0, n) for a key."""
    return int(hashes(key, np.zeros(1, np.uint64))[0] % np.uint64(n))
