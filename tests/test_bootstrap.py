"""Intervals: what they must be exactly, and how often they hold the truth."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llm_finetune_kit.evaluation.bootstrap import ANY, Interval, _weights, paired_difference, student
from llm_finetune_kit.evaluation.metrics import mean_of, share
from llm_finetune_kit.evaluation.overlap import bleu_rows, bleu_total
from llm_finetune_kit.evaluation.paired_shares import score_interval, sign_test


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks/intervals.py"
    spec = importlib.util.spec_from_file_location("intervals", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "rows"), [("normal", 8), ("losses", 16), ("matches", 16), ("BLEU", 32), ("rare", 64)])
def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_cases(simulation: ModuleType, kind: str, rows: int) -> None:
    """Within 2 points, and 2 standard errors of 300 repeats; benchmarks/intervals.py has 1,000 and all sizes."""
    held, _, silent = simulation.coverage(kind, rows, 300, seed=5)
    error = math.sqrt(0.95 * 0.05 / 300)
    assert 0.93 - 2 * error <= held <= 0.97 + 2 * error and silent < 0.02


@pytest.mark.parametrize(("kind", "rows"), [("rare", 8), ("rare", 32), ("matches", 16), ("overlap", 16), ("losses", 8)])
def test_where_nothing_differs_hardly_a_difference_is_claimed(simulation: ModuleType, kind: str, rows: int) -> None:
    claimed, _ = simulation.false_claims(kind, rows, 200, seed=5)
    assert claimed <= 0.05 + 2 * math.sqrt(0.95 * 0.05 / 200)


@pytest.mark.parametrize(("rows", "won", "lost"), [(8, 0.1, 0.05), (10, 0.3, 0.1), (12, 0.02, 0.02), (16, 0.5, 0.1)])
def test_the_interval_of_right_and_wrong_holds_the_truth_exactly_often_enough(rows: int, won: float, lost: float) -> None:
    """Every outcome with its probability, no simulation: a score interval may fall a little short of 95 %."""
    held = false = 0.0
    for more in range(rows + 1):
        for less in range(rows + 1 - more):
            ways = math.comb(rows, more) * math.comb(rows - more, less)
            low, high = score_interval(more, less, rows, 0.95)
            assert -1 <= low <= (more - less) / rows <= high <= 1
            held += ways * won**more * lost**less * (1 - won - lost) ** (rows - more - less) * (low <= won - lost <= high)
            even = ways * 0.2 ** (more + less) * 0.6 ** (rows - more - less)
            false += even * (low > 0 or high < 0)
    assert held >= 0.935 and false <= 0.05


def test_fewer_rows_that_differ_than_a_sign_test_takes_claim_nothing() -> None:
    """Five of five answers that became right are no proof; six of six are."""
    assert [round(sign_test(won, 0), 4) for won in (5, 6)] == [0.0625, 0.0312] and sign_test(3, 3) == 1
    for rows, won, sign in ((5, 5, 0), (40, 5, 0), (40, 6, 1), (6, 6, 1)):
        right = np.arange(rows) < won
        assert paired_difference(mean_of(np.zeros(rows)), mean_of(right), share, limits=(0, 1)).sign == sign, (rows, won)
    overlap = np.linspace(0.1, 0.9, 20)
    for changed, known in ((0, False), (5, False), (6, True)):
        found = paired_difference(mean_of(overlap), mean_of(overlap + 0.05 * (np.arange(20) < changed)), share, limits=(0, 1))
        assert (found.low is not None) == known and found.value == pytest.approx(0.05 * changed / 20)
    same = paired_difference(mean_of(np.zeros(5)), mean_of(np.full(5, 0.3)), share)
    assert same.low is None, "five rows that move by the same amount are five signs"


def test_rows_without_anything_to_count_do_not_count() -> None:
    base, tuned = mean_of(np.zeros(10)), mean_of(np.arange(10) < 8)
    empty = np.zeros((30, 2))
    assert paired_difference(np.concatenate([base, empty]), np.concatenate([tuned, empty]), share) == paired_difference(
        base, tuned, share
    )


def test_intervals_stay_inside_the_range_of_the_metric() -> None:
    """Without limits the corrected ends of these leave it."""
    source = np.random.default_rng(4)
    size = np.full(8, 20.0)
    base = np.stack([source.gamma(1, 1.5, 8) * size, size], axis=1)

    def perplexity(sums: np.ndarray) -> np.ndarray:
        return np.exp(share(sums))

    free, bound = (paired_difference(base, base * [0.05, 1], perplexity, limits=limits) for limits in (ANY, (1.0, math.inf)))
    assert free.high is not None and bound.high is not None and free.high > bound.high
    worst = float(max(perplexity(weights @ (base * [0.05, 1])).max() for weights in _weights(8, 0)))
    assert bound.high == pytest.approx(worst - 1), "the tuned model at its worst, and a base that is never unsure"
    answers = mean_of([0.9, 1.0, 0.9, 1.0, 0.9, 1.0])
    free, bound = (paired_difference(mean_of(np.zeros(6)), answers, share, limits=limits) for limits in (ANY, (0.0, 1.0)))
    assert free.high is not None and bound.high is not None and free.high > 1 >= bound.high


def test_equal_sides_differ_by_exactly_nothing() -> None:
    rows = bleu_rows(["the cat sat on the mat", "a dog", "x"], ["the cat is on the mat", "a dog ran", "y"])
    assert paired_difference(rows, rows.copy(), bleu_total) == Interval(0.0, 0.0, 0.0)
    assert Interval(0.0, 0.0, 0.0).sign == 0


def test_what_makes_a_row_hard_for_both_does_not_widen_the_interval() -> None:
    source = np.random.default_rng(0)
    hard = source.normal(0, 10, 40)
    gain = source.normal(1, 0.1, 40)
    found = paired_difference(mean_of(hard), mean_of(hard + gain), share)
    assert found.low is not None and found.high is not None
    assert 0.9 < found.low < found.high < 1.1 and found.sign == 1


def test_a_difference_has_a_sign_and_swapping_the_sides_turns_it() -> None:
    source = np.random.default_rng(1)
    base, tuned = mean_of(source.normal(3, 1, 30)), mean_of(source.normal(1, 1, 30))
    found, turned = paired_difference(base, tuned, share), paired_difference(tuned, base, share)
    assert (found.sign, turned.sign) == (-1, 1)
    assert found.value == pytest.approx(-turned.value) and found.low == pytest.approx(-turned.high, abs=0.05)  # type: ignore[operator]


def test_order_does_not_matter_and_the_seed_fixes_the_resamples() -> None:
    source = np.random.default_rng(2)
    base, tuned = mean_of(source.normal(0, 1, 50)), mean_of(source.normal(0.2, 1, 50))
    found = paired_difference(base, tuned, share, seed=4)
    assert paired_difference(base, tuned, share, seed=4) == found
    again = paired_difference(base[::-1], tuned[::-1], share, seed=4)
    assert again.value == pytest.approx(found.value) and again.low == pytest.approx(found.low, abs=0.05)


def test_few_rows_or_no_number_give_no_interval() -> None:
    two = mean_of([1.0, 2.0])
    assert paired_difference(two, two + np.array([1, 0]), share) == Interval(1.0)
    empty = np.zeros((5, 2))
    assert paired_difference(empty, empty, share) == Interval(None)


def test_resamples_of_many_rows_are_made_in_blocks_and_fast() -> None:
    source = np.random.default_rng(3)
    base = np.stack([source.gamma(5, 10, 5000), np.full(5000, 20.0)], axis=1)
    started = time.process_time()
    found = paired_difference(base, base * [0.9, 1], share)
    assert time.process_time() - started < 10 and found.sign == -1


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (5, 2.5706), (11, 2.2010), (30, 2.0423), (200, 1.9719)])
def test_students_t(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, abs=1e-3)
