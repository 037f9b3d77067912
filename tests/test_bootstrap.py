"""Intervals: what they must be exactly, and how often they hold the truth."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llm_finetune_kit.evaluation.bootstrap import Interval, paired_difference, student
from llm_finetune_kit.evaluation.metrics import mean_of, share
from llm_finetune_kit.evaluation.overlap import bleu_rows, bleu_total


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks/intervals.py"
    spec = importlib.util.spec_from_file_location("intervals", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# `rare` needs many rows: of 8, one sample in four holds no row that differs, and says nothing (docs/evaluation.md).
@pytest.mark.parametrize(("kind", "rows"), [("normal", 8), ("losses", 16), ("matches", 16), ("BLEU", 32), ("rare", 64)])
def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_cases(simulation: ModuleType, kind: str, rows: int) -> None:
    """Within 2 points, and 2 standard errors of 300 repeats; benchmarks/intervals.py has 1,000 and all sizes."""
    held, _ = simulation.coverage(kind, rows, 300, seed=5)
    error = math.sqrt(0.95 * 0.05 / 300)
    assert 0.93 - 2 * error <= held <= 0.97 + 2 * error


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
