"""How sure a difference is: 95 % intervals from the rows alone, by the paired bootstrap.

Rows are drawn again with replacement, the same ones for base and tuned, so what makes a row hard for both cancels out.
Every metric here is a function of sums over rows, and a resample only changes how often a row is counted: 2,000 resamples
are one matrix product.

The plain percentile interval is too narrow for few rows (benchmarks/intervals.py: it held the true value in 86 % of cases
with 8 rows instead of 95 %). Its ends are therefore moved outwards as Student's t is wider than the normal (Hesterberg 2015,
"What Teachers Should Know About the Bootstrap"), and they are never inside the t interval of the jackknife with the same
paper's correction for skew: that holds where few rows decide and resamples miss them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 3  # rows: of fewer, nobody can tell how much rows differ
METHOD = f"paired bootstrap over rows, {RESAMPLES:,} resamples, widened for few rows and skew, {LEVEL:.0%}"
AT_ONCE = 4_000_000  # weights of resamples held at a time
T = (12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.306, 2.2622, 2.2281)  # 97.5 % point, 1 to 10 degrees of freedom

Total = Callable[[np.ndarray], np.ndarray]  # from sums over rows [..., k] to the metric's value [...]


@dataclass(frozen=True)
class Interval:
    """A difference (tuned minus base) and the ends of its interval; None where nothing can be said."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def paired_difference(base: np.ndarray, tuned: np.ndarray, total: Total, *, seed: int = 0) -> Interval:
    """total(sums of tuned) - total(sums of base) with its interval; both [rows, k], row by row the same rows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(total(tuned.sum(0)) - total(base.sum(0)))
        if not math.isfinite(value) or len(base) < FEWEST:
            return Interval(value if math.isfinite(value) else None)
        drawn = np.concatenate([total(w @ tuned) - total(w @ base) for w in _weights(len(base), seed)])
        without = total(tuned.sum(0) - tuned) - total(base.sum(0) - base)
    drawn, without = drawn[np.isfinite(drawn)], without[np.isfinite(without)]
    if len(drawn) < RESAMPLES / 2 or len(without) < FEWEST:
        return Interval(value)
    low, high = _ends(drawn, without, value, len(base))
    return Interval(value, low, high)


def _ends(drawn: np.ndarray, without: np.ndarray, value: float, rows: int) -> tuple[float, float]:
    """The outer ends of the widened percentile interval and of the skewed t interval.

    `drawn` are the differences of the resamples, `without` those that leave one row out each.
    """
    t = student(rows - 1)
    tail = NormalDist().cdf(-t * math.sqrt(rows / (rows - 1)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    pull = without.mean() - without  # how far each row pulls the difference up
    spread = float(np.square(pull).mean())
    if spread == 0:
        return float(low), float(high)
    error = math.sqrt((rows - 1) * spread)
    skew = float((pull**3).mean()) / spread**1.5 / (6 * math.sqrt(rows))
    middle = value + error * skew * (1 + 2 * t**2)
    return float(min(low, middle - t * error)), float(max(high, middle + t * error))


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t (for more than 10 degrees of freedom by Cornish and Fisher, to 1e-3)."""
    if freedom <= len(T):
        return T[freedom - 1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    series = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return float(sum(term / freedom**power for power, term in enumerate(series)))


def _weights(rows: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample counts each row, float64 [resamples, rows], in blocks."""
    generator = np.random.Generator(np.random.PCG64(seed))
    left, block = RESAMPLES, max(1, AT_ONCE // rows)
    while left > 0:
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=min(block, left)).astype(np.float64)
        left -= block
