"""Metrics against their reference packages, on vectors and on known answers."""

from __future__ import annotations

import random
import sys
from decimal import Decimal
from types import ModuleType

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from llm_finetune_kit.errors import ConfigError, MachineError
from llm_finetune_kit.evaluation import overlap, text_counts
from llm_finetune_kit.evaluation.metrics import TABLE, Metric, Said, adds_up, chosen, custom, mean_of
from llm_finetune_kit.generation import Answer

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "in", "of", "to", "runs", "12", "price,", "said."]
WORDS += ["'Yes'", "naïve", "東京", "–", "(maybe)"]


def texts(seed: int, count: int) -> tuple[list[str], list[str]]:
    """Pairs that share some words: among them equal ones, empty answers and single words."""
    dice = random.Random(seed)
    references = [" ".join(dice.choices(WORDS, k=dice.randint(1, 25))) for _ in range(count)]
    said = [" ".join(dice.choice(WORDS) if dice.random() < 0.4 else word for word in text.split()) for text in references]
    said[:3] = [references[0], "", "cat"]
    return said, references


def made(said: list[str], references: list[str]) -> Said:
    return Said([Answer(text, len(text), True) for text in said], references)


@pytest.mark.parametrize("seed", range(5))
def test_corpus_scores_are_those_of_the_reference_packages(seed: int) -> None:
    said, references = texts(seed, 24)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score(reference, text) for text, reference in zip(said, references, strict=True)]
    wanted = {
        "bleu": sacrebleu.corpus_bleu(said, [references]).score / 100,
        "chrf": sacrebleu.corpus_chrf(said, [references]).score / 100,
        **{name: float(np.mean([score[name].fmeasure for score in scores])) for name in ("rouge1", "rouge2", "rougeL")},
    }
    assert 0.05 < wanted["bleu"] < 0.95
    for name, value in wanted.items():
        assert TABLE[name].value(made(said, references)) == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("said", "references"),
    [
        (["x y z"], ["a b c"]),  # nothing in common
        (["a b"], ["a b"]),  # too short for 4-grams
        (["a b c d e f"], ["a b x d e f"]),  # no 4-gram matches: smoothed
        (["", ""], ["a b", "c"]),
        (["a b c d e f g h"], ["a b c d"]),
    ],
)
def test_the_corners_of_bleu_and_chrf_are_sacrebleus(said: list[str], references: list[str]) -> None:
    pair = made(said, references)
    assert TABLE["bleu"].value(pair) == pytest.approx(sacrebleu.corpus_bleu(said, [references]).score / 100, abs=1e-9)
    assert TABLE["chrf"].value(pair) == pytest.approx(sacrebleu.corpus_chrf(said, [references]).score / 100, abs=1e-9)


def test_sums_of_many_resamples_are_scored_like_each_alone() -> None:
    said, references = texts(7, 12)
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=20)
    for rows, total, corpus in (
        (overlap.bleu_rows, overlap.bleu_total, sacrebleu.corpus_bleu),
        (overlap.chrf_rows, overlap.chrf_total, sacrebleu.corpus_chrf),
    ):
        found = total(weights @ rows(said, references))
        for value, row in zip(found, weights, strict=True):
            picked = np.repeat(np.arange(12), row)
            alone = corpus([said[i] for i in picked], [[references[i] for i in picked]]).score / 100
            assert value == pytest.approx(alone, abs=1e-6)


def test_order_of_rows_and_their_number_at_once_do_not_matter() -> None:
    said, references = texts(3, 20)
    for name in ("bleu", "chrf", "rougeL", "repetition", "distinct_2", "length"):
        value = TABLE[name].value(made(said, references))
        assert TABLE[name].value(made(said[::-1], references[::-1])) == pytest.approx(value, abs=1e-12)


def test_every_metric_says_how_it_was_measured() -> None:
    signatures = {name: metric.signature() for name, metric in TABLE.items() if name != "bertscore"}
    assert "tok:13a|smooth:exp|version:" in signatures["bleu"] and "nc:6|nw:0" in signatures["chrf"]
    assert "stemmer:no" in signatures["rouge1"] and signatures["stop_rate"].startswith("llm-finetune-kit|")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 5 + 3 = 8.\n#### 8", "8"),
        ("#### 1,234", "1234"),
        ("It costs $1,050.50 in all", "1050.50"),
        ("first 3, then 4", "4"),
        ("#### -7 apples, not 9", "-7"),
        ("#### none", None),
        ("no number at all", None),
    ],
)
def test_the_final_number_is_found(text: str, number: str | None) -> None:
    assert text_counts.final_number(text) == (Decimal(number) if number else None)


def test_numbers_are_compared_as_numbers_and_only_where_there_is_one() -> None:
    said, references = ["#### 1,000.0", "it is 4", "x"], ["#### 1000", "#### 5", "no number"]
    assert text_counts.numeric(said, references).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert TABLE["numeric_match"].value(made(said, references)) == 0.5


def test_what_answers_are_like_by_themselves() -> None:
    said = Said([Answer("a b c d a b c d", 9, True), Answer("one", 2, False)], ["", ""])
    assert TABLE["repetition"].value(said) == pytest.approx(1 / 5)
    assert TABLE["stop_rate"].value(said) == 0.5
    assert TABLE["length"].value(said) == 4.5
    assert TABLE["distinct_1"].value(said) == pytest.approx(5 / 9)
    assert text_counts.exact(["a  b\n", "A b"], ["a b", "a b"]) == [1.0, 0.0]


def test_the_default_set_suits_the_references() -> None:
    def names(*references: str) -> list[str]:
        return [metric.name for metric in chosen(None, list(references))]

    always = ["length", "stop_rate", "repetition", "distinct_2"]
    long = "a sentence of more than five words"
    assert names(long) == ["bleu", "chrf", "rouge1", "rouge2", "rougeL", *always]
    assert names("yes", "no")[0] == "exact_match"
    assert names(f"{long} #### 5")[0] == "numeric_match"
    assert names("", "") == always
    assert [metric.name for metric in chosen(["perplexity", "bleu"], [long])] == ["bleu"]
    with pytest.raises(ConfigError, match="no metric blue") as caught:
        chosen(["blue"], [long])
    assert caught.value.fix == "did you mean bleu?"


# --- metrics of one's own ----------------------------------------------------------------------------------


def vowels(predictions: list[str], references: list[str]) -> float:
    """A mean over rows."""
    return float(np.mean([sum(letter in "aeiou" for letter in text) for text in predictions]))


def longest(predictions: list[str], references: list[str]) -> float:
    """No mean over rows."""
    return float(max(map(len, predictions)))


def custom_metric_function(pred: str, ref: str) -> float:
    return float(pred == ref)


class CustomEvaluator:
    """The framework's example of a metric of one's own, section 8.3, line by line."""

    def compute_metric(self, predictions, references):  # type: ignore[no-untyped-def]
        # Implement custom metric
        scores = []
        for pred, ref in zip(predictions, references):  # noqa: B905
            score = custom_metric_function(pred, ref)
            scores.append(score)
        return np.mean(scores)


def test_functions_and_the_class_of_the_framework_are_metrics() -> None:
    said = made(["aa", "b", "same"], ["x", "y", "same"])
    found = chosen([vowels, CustomEvaluator(), longest], said.references)
    assert [metric.name for metric in found] == ["vowels", "CustomEvaluator", "longest"]
    assert [metric.value(said) for metric in found] == [pytest.approx(4 / 3), pytest.approx(1 / 3), 4.0]
    assert [adds_up(metric, said) for metric in found] == [True, True, False]
    own = custom(vowels, name="mine", better=-1)
    assert (own.name, own.better) == ("mine", -1) and isinstance(own, Metric)


# --- BERTScore: no model can be had here, so only the way to the package is tried ----------------------------


def test_bertscore_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(MachineError) as caught:
        TABLE["bertscore"].value(made(["a"], ["a"]))
    assert caught.value.fix == "pip install 'llm-finetune-kit[bertscore]'"


def test_bertscore_hands_answers_and_references_on_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    package = ModuleType("bert_score")

    def score(cands: list[str], refs: list[str], *, model_type: str, rescale_with_baseline: bool) -> tuple[list[float], ...]:
        asked.append((cands, refs, model_type, rescale_with_baseline))
        return [0.0, 0.0], [0.0, 0.0], [0.25, 0.75]

    package.score = score  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bert_score", package)
    assert TABLE["bertscore"].value(made(["a", "b"], ["c", "d"])) == 0.5
    assert asked == [(["a", "b"], ["c", "d"], "roberta-large", False)]


def test_means_are_shares_of_sums() -> None:
    assert mean_of([1.0, 0.0]).tolist() == [[1, 1], [0, 1]]
