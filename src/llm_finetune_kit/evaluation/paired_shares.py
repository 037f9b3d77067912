"""The interval of a difference of two shares over the same rows: how many more answers are right, of right and wrong ones.

Tango's score interval (1998, "Equivalence test and confidence interval for the difference in proportions for the
paired-sample design", Statistics in Medicine 17): it stays inside -1 to 1 and has a width where no row differs. It is drawn out
to zero where the exact sign test shows nothing, which with fewer than six rows that differ it never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

HALVINGS = 50  # of an interval of length 2: below the rounding of what is shown


def score_interval(won: int, lost: int, rows: int, level: float) -> tuple[float, float]:
    """The ends of the interval of (won - lost) / rows, where so many rows became right and wrong."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    value = (won - lost) / rows
    low = _crossing(lambda difference: _score(won, lost, rows, difference) > z, -1.0, value)
    high = _crossing(lambda difference: _score(won, lost, rows, difference) >= -z, value, 1.0)
    if sign_test(won, lost) > 1 - level:
        return min(low, 0.0), max(high, 0.0)
    return low, high


def sign_test(won: int, lost: int) -> float:
    """How probable it is, two-sided, that rows which differ fall so unevenly where both ways are equally likely."""
    rows, most = won + lost, max(won, lost)
    tail = sum(math.comb(rows, count) for count in range(most, rows + 1))
    return min(1.0, float(2 * tail / 2**rows))


def _score(won: int, lost: int, rows: int, difference: float) -> float:
    """Standard errors between what was seen and a supposed difference; it falls as the difference grows."""
    a, b = 2 * rows, -won - lost + (2 * rows - won + lost) * difference
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # the likeliest share of lost rows under that difference
    spread = rows * (2 * share + difference * (1 - difference))
    gap = won - lost - rows * difference
    if spread <= 1e-12:
        return math.copysign(math.inf, gap) if abs(gap) > 1e-9 else 0.0
    return gap / math.sqrt(spread)


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds at first ends, between two values."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return (low + high) / 2
