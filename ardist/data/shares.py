"""Exact shares of a mixture: no rounding error accumulates and no random numbers are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ardist.errors import ConfigError


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights as fractions of their sum, taken as the decimal numbers that were written."""
    parts = [Fraction(str(weight)) for weight in weights]
    return [part / sum(parts) for part in parts]


class SlotShares:
    """How many of the first c places of a mixture belong to each dataset, for every c.

    With cumulative shares 0 = C_0 < ... < C_D = 1, dataset d has floor(c C_{d+1}) - floor(c C_d) of the first c
    places. That sums to c and is within one of c p_d, always.
    """

    def __init__(self, shares: Sequence[Fraction], batch: int) -> None:
        small = [number for number, share in enumerate(shares) if share * batch < 1]
        if small:
            least = min(shares)
            raise ConfigError(
                f"dataset {small[0]} of the mixture has a share of {float(shares[small[0]]):g}, less than one sample "
                f"in a global batch of {batch}; legal: shares of at least 1/{batch}, or global batches of at least "
                f"{-(-least.denominator // least.numerator)}"
            )
        self._ends = [sum(shares[: number + 1], Fraction(0)) for number in range(len(shares))]

    def served(self, places: int) -> list[int]:
        """Places of each dataset among the first `places`."""
        ends = [places * end.numerator // end.denominator for end in self._ends]
        return [high - low for low, high in zip([0, *ends[:-1]], ends, strict=True)]


def next_turn(shares: Sequence[Fraction], served: Sequence[int]) -> int:
    """Whose turn it is after each dataset was `served` so many times: nobody is ever off by one whole turn.

    The rule of the chairman assignment problem (Tijdeman, 1980): among those whose claim after this turn is at least
    1 / (2 D - 2), the one whose claim first becomes too large. Every deviation stays below 1 - 1 / (2 D - 2).
    """
    if len(shares) == 1:
        return 0
    turn, slack = sum(served) + 1, Fraction(1, 2 * len(shares) - 2)
    claims = [share * turn - done for share, done in zip(shares, served, strict=True)]
    due = [number for number, claim in enumerate(claims) if claim >= slack]
    return min(due, key=lambda number: ((1 - slack - claims[number]) / shares[number], number))
