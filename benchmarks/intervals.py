"""How often the interval of a comparison holds the true difference: simulated data whose truth is known.

    python benchmarks/intervals.py [repeats]

The first table: it should say 95 %, and plain percentile intervals are shown beside it. The second: data in which there is
no difference, and how often one is claimed all the same; it should say 5 % or less. In brackets, where nothing is said at all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np

from llm_finetune_kit.evaluation import bootstrap
from llm_finetune_kit.evaluation.metrics import share
from llm_finetune_kit.evaluation.overlap import bleu_total

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
ROWS = (4, 8, 16, 32, 64)
MANY = 400_000  # rows that stand for the truth where no formula gives it


def normal(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences around 0.3, one unit of size each."""
    return _pair(np.zeros(rows), source.normal(0.3, 1.0, rows), np.ones(rows))


def skewed(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Exponential differences: many small ones, few large."""
    return _pair(np.zeros(rows), source.exponential(1.0, rows), np.ones(rows))


def losses(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Token-weighted losses: lengths differ tenfold, short answers are harder, the tuned model is 10 % better."""
    length = np.maximum(1, source.lognormal(3.5, 0.6, rows)).round()
    base = source.gamma(9, 0.3, rows) + 4 / np.sqrt(length)
    return _pair(base * length, base * length * source.normal(0.9, 0.1, rows), length)


def matches(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong: 30 % of rows are won, 10 % lost, the others are ties."""
    return _outcomes(source, rows, 0.3, 0.1)


def rare(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong: 10 % of rows are won, 5 % lost, the others are ties."""
    return _outcomes(source, rows, 0.1, 0.05)


def bleu(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """n-gram counts of answers of different length, of which the tuned model matches a few more."""
    length = np.maximum(5, source.poisson(source.gamma(2, 10, rows)))
    quality = source.beta(4, 4, rows)
    better = np.clip(quality + source.normal(0.05, 0.1, rows), 0, 1)
    return _ngrams(source, length, quality), _ngrams(source, length, better)


def overlap(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlap from 0 to 1 of answers four in five of which are the same, as after a short training."""
    return _overlap(source, rows, 0.1)


def sure(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Perplexities near 1: losses of which some are almost nothing."""
    size = np.full(rows, 20.0)
    base = source.gamma(1.0, 1.0, rows)
    return _pair(base * size, base * size * source.beta(1, 4, rows), size)


def _overlap(source: np.random.Generator, rows: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    base, same = source.beta(1, 2, rows), source.random(rows) < 0.8
    tuned = np.clip(base + source.normal(gain, 0.2, rows), 0, 1)
    return _pair(base, np.where(same, base, tuned), np.ones(rows))


def _pair(base: np.ndarray, tuned: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([base, size], axis=1), np.stack([tuned, size], axis=1)


def _outcomes(source: np.random.Generator, rows: int, won: float, lost: float) -> tuple[np.ndarray, np.ndarray]:
    drawn = source.random(rows)
    return _pair((drawn > 1 - lost).astype(float), (drawn < won).astype(float), np.ones(rows))


def _ngrams(source: np.random.Generator, length: np.ndarray, quality: np.ndarray) -> np.ndarray:
    counts = [np.maximum(length - n, 0) for n in range(4)]
    matched = [source.binomial(count, quality ** (1 + 0.5 * n)) for n, count in enumerate(counts)]
    return np.stack([length, length, *matched, *counts], axis=1).astype(float)


def perplexity(sums: np.ndarray) -> np.ndarray:
    """As the comparison reckons it."""
    return np.exp(share(sums))


KINDS: dict[str, tuple[Draw, bootstrap.Total, bootstrap.Range]] = {
    "normal": (normal, share, bootstrap.ANY),
    "skewed": (skewed, share, bootstrap.ANY),
    "losses": (losses, share, (0.0, math.inf)),
    "perplexity": (losses, perplexity, (1.0, math.inf)),
    "perplexity near 1": (sure, perplexity, (1.0, math.inf)),
    "matches": (matches, share, (0.0, 1.0)),
    "rare": (rare, share, (0.0, 1.0)),
    "overlap": (overlap, share, (0.0, 1.0)),
    "BLEU": (bleu, bleu_total, (0.0, 1.0)),
}


def swapped(draw: Draw) -> Draw:
    """The same data with no difference: each row's sides change places with probability a half."""

    def drawn(source: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        base, tuned = draw(source, rows)
        turn = source.random(len(base))[:, None] < 0.5
        return np.where(turn, tuned, base), np.where(turn, base, tuned)

    return drawn


def coverage(kind: str, rows: int, repeats: int, seed: int = 0) -> tuple[float, float, float]:
    """Shares of repeats in which our interval, and a plain percentile interval, hold the true difference; and without ours."""
    draw, total, limits = KINDS[kind]
    source = np.random.Generator(np.random.PCG64([seed, rows]))
    base, tuned = draw(source, MANY)
    truth = float(total(tuned.sum(0)) - total(base.sum(0)))
    ours = plain = silent = 0
    for number in range(repeats):
        base, tuned = draw(source, rows)
        found = bootstrap.paired_difference(base, tuned, total, seed=number, limits=limits)
        if found.low is None or found.high is None:
            silent += 1
        else:
            ours += found.low - 1e-12 <= truth <= found.high + 1e-12
        weights = np.concatenate(list(bootstrap._weights(rows, number)))
        low, high = np.quantile(total(weights @ tuned) - total(weights @ base), [0.025, 0.975])
        plain += low - 1e-12 <= truth <= high + 1e-12
    return ours / max(1, repeats - silent), plain / repeats, silent / repeats


def false_claims(kind: str, rows: int, repeats: int, seed: int = 0) -> tuple[float, float]:
    """Shares of repeats in which a difference is claimed where there is none, and in which nothing is said."""
    draw, total, limits = KINDS[kind]
    draw, source = swapped(draw), np.random.Generator(np.random.PCG64([seed, rows, 1]))
    claimed = silent = 0
    for number in range(repeats):
        found = bootstrap.paired_difference(*draw(source, rows), total, seed=number, limits=limits)
        claimed += found.sign != 0
        silent += found.low is None
    return claimed / repeats, silent / repeats


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    head = "| data | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |\n|---|" + "---|" * len(ROWS)
    print(f"{repeats:,} repeats; the standard error of a share is {100 * math.sqrt(0.05 * 0.95 / repeats):.1f} points\n")
    print(head)
    for kind in KINDS:
        found = [coverage(kind, rows, repeats) for rows in ROWS]
        cells = [
            f"{100 * ours:.1f} ({100 * plain:.1f})" if silent < 1 else f"– ({100 * plain:.1f})" for ours, plain, silent in found
        ]
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nno difference, and one is claimed\n\n{head}")
    for kind in KINDS:
        claims = [false_claims(kind, rows, repeats) for rows in ROWS]
        print(f"| {kind} | " + " | ".join(f"{100 * one:.1f} ({100 * silent:.0f})" for one, silent in claims) + " |", flush=True)


if __name__ == "__main__":
    main()
