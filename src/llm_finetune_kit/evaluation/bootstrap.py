"""How sure a difference is: 95 % intervals from the rows alone, by the paired bootstrap.

Rows are drawn again with replacement, the same ones for base and tuned, so what makes a row hard for both cancels out.
Every metric here is a function of sums over rows, and a resample only changes how often a row is counted: 2,000 resamples
are one matrix product.

The plain percentile interval is too narrow for few rows (benchmarks/intervals.py: it held the true value in 86 % of cases
with 8 rows instead of 95 %). Its ends are therefore moved outwards as Student's t is wider than the normal (Hesterberg 2015,
"What Teachers Should Know About the Bootstrap"), and they are never inside the t interval of the jackknife with the same
paper's correction for skew: that holds where few rows decide and resamples miss them.

Where rows are right or wrong, and mostly so for both, a sample may hold hardly a row that differs, and no resample knows of
others. There the score interval takes the bootstrap's place, and it leaves zero out only where the exact sign test does
(`paired_shares.py`). Of other metrics nothing is said where some rows are equal and fewer than FEWEST_DIFFERING differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from llm_finetune_kit.evaluation.paired_shares import score_interval

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 3  # rows: of fewer, nobody can tell how much rows differ
FEWEST_DIFFERING = 6  # rows: of fewer, no two-sided sign test at 5 % shows anything, as 2 / 2**5 is more than that
METHOD = (
    f"paired bootstrap over rows, {RESAMPLES:,} resamples, widened for few rows and skew; of right and wrong answers the score "
    f"interval, where the sign test agrees; {LEVEL:.0%}"
)
AT_ONCE = 4_000_000  # weights of resamples held at a time
T = (12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.306, 2.2622, 2.2281)  # 97.5 % point, 1 to 10 degrees of freedom

Total = Callable[[np.ndarray], np.ndarray]  # from sums over rows [..., k] to the metric's value [...]
Range = tuple[float, float]  # the least and the most that a metric can be
ANY: Range = (-math.inf, math.inf)


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


def paired_difference(base: np.ndarray, tuned: np.ndarray, total: Total, *, seed: int = 0, limits: Range = ANY) -> Interval:
    """total(sums of tuned) - total(sums of base) with its interval; both [rows, k], row by row the same rows.

    `limits` is the metric's range: the interval holds no difference that it leaves no room for.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(total(tuned.sum(0)) - total(base.sum(0)))
        if not math.isfinite(value) or len(base) < FEWEST:
            return Interval(value if math.isfinite(value) else None)
        counted = (base != 0).any(axis=1) | (tuned != 0).any(axis=1)
        base, tuned = base[counted], tuned[counted]
        if _right_or_wrong(base, tuned, total):
            return Interval(value, *score_interval(*_changed(base, tuned), len(base), LEVEL))
        if len(base) < FEWEST or not _enough_differ(base, tuned, bounded=math.isfinite(limits[1])):
            return Interval(value)
        both = [(total(weights @ base), total(weights @ tuned)) for weights in _weights(len(base), seed)]
        before, after = (np.concatenate(parts) for parts in zip(*both, strict=True))
        without = total(tuned.sum(0) - tuned) - total(base.sum(0) - base)
    drawn, without = (part[np.isfinite(part)] for part in (after - before, without))
    if len(drawn) < RESAMPLES / 2 or len(without) < FEWEST:
        return Interval(value)
    low, high = _ends(drawn, without, value, len(base))
    least, most = _room(before, after, limits)
    return Interval(value, max(low, min(least, value)), min(high, max(most, value)))


def _right_or_wrong(base: np.ndarray, tuned: np.ndarray, total: Total) -> bool:
    """Whether the metric is the share of rows that are right, and each is right or wrong."""
    if base.shape[1] != 2 or not all(np.isin(side[:, 0], (0, 1)).all() and (side[:, 1] == 1).all() for side in (base, tuned)):
        return False
    return all(float(total(side.sum(0))) == side[:, 0].mean() for side in (base, tuned))


def _changed(base: np.ndarray, tuned: np.ndarray) -> tuple[int, int]:
    """Rows that were wrong and are right, and the other way round."""
    change = tuned[:, 0] - base[:, 0]
    return int((change > 0).sum()), int((change < 0).sum())


def _enough_differ(base: np.ndarray, tuned: np.ndarray, *, bounded: bool) -> bool:
    """Whether all rows differ or as many as it takes; rows that all differ by the same count by their signs only.

    Losses that are equal to the last bit come of equal models, so there is nothing to doubt where none differs. Of metrics of
    answers, which have a most (`bounded`), equal rows tell nothing about others.
    """
    change = (tuned - base)[(tuned != base).any(axis=1)]
    if len(change) >= FEWEST_DIFFERING:
        return True
    if not len(change):
        return not bounded
    return len(change) == len(base) and len(np.unique(np.abs(change), axis=0)) > 1


def _room(before: np.ndarray, after: np.ndarray, limits: Range) -> Range:
    """The least and the most that a difference can be, base and tuned lying in the range and among their resamples."""
    before, after = before[np.isfinite(before)], after[np.isfinite(after)]
    least = max(limits[0] - float(before.max()), float(after.min()) - limits[1])
    most = min(limits[1] - float(before.min()), float(after.max()) - limits[0])
    return least, most


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
