"""The hashes behind every order never change: known answers."""

from __future__ import annotations

import numpy as np
import pytest

from ardist.data.keyed import Domain, _mix, below, derive_key, hashes, permutation

GOLDEN = 0x9E3779B97F4A7C15


def test_finaliser_is_that_of_splitmix64() -> None:
    # The first two outputs of the published SplitMix64 generator for seed 0.
    states = np.array([GOLDEN, 2 * GOLDEN % 2**64], np.uint64)
    assert [hex(word) for word in _mix(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_permutation_is_a_permutation_and_depends_on_every_word() -> None:
    seen = set()
    for words in [(0, 0), (0, 1), (1, 0), (-1, 0), (2**63, 0)]:
        order = permutation(derive_key(Domain.BLOCKS, *words), 50)
        assert sorted(order.tolist()) == list(range(50))
        seen.add(tuple(order.tolist()))
    seen.add(tuple(permutation(derive_key(Domain.WINDOW, 0, 0), 50).tolist()))
    assert len(seen) == 6


def test_ties_are_broken_by_index() -> None:
    key = derive_key(Domain.BLOCKS, 1)
    table = hashes(key[:, None], np.zeros((1, 5), np.uint64))
    assert np.argsort(table, axis=1, kind="stable").tolist() == [[0, 1, 2, 3, 4]]


def test_keys_of_several_lanes_equal_those_of_each_lane() -> None:
    together = permutation(derive_key(Domain.WINDOW, 7, 0, np.arange(3), 5), 6)
    apart = [permutation(derive_key(Domain.WINDOW, 7, 0, lane, 5), 6).tolist() for lane in range(3)]
    assert together.tolist() == apart


@pytest.mark.parametrize("n", [2, 3, 5])
def test_small_permutations_are_uniform(n: int) -> None:
    keys = derive_key(Domain.WINDOW, 11, np.arange(24_000))
    table = permutation(keys, n)
    _, counts = np.unique(table @ (n ** np.arange(n)), return_counts=True)
    cells = int(np.prod(np.arange(1, n + 1)))
    expected = len(table) / cells
    assert len(counts) == cells
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Chi-square with `cells` - 1 degrees of freedom stays within six standard deviations of its mean.
    assert statistic < cells - 1 + 6 * np.sqrt(2 * (cells - 1))


def test_below_stays_below() -> None:
    values = [below(derive_key(Domain.ROTATION, seed), 7) for seed in range(2000)]
    assert set(values) == set(range(7))


def test_known_answers() -> None:
    key = derive_key(Domain.BLOCKS, 1, 2)
    assert hex(int(key[0])) == "0xc4b68bc20b604ab2"
    assert permutation(key, 10).tolist() == [8, 3, 0, 7, 2, 5, 1, 6, 4, 9]
    assert below(derive_key(Domain.ROTATION, -1, 3), 1000) == 688
    assert permutation(derive_key(Domain.WINDOW, 7, 0, np.arange(2), 5), 6).tolist() == [
        [4, 0, 2, 5, 1, 3],
        [5, 4, 3, 0, 2, 1],
    ]
