"""BLEU, chrF and ROUGE: the reference packages count, and the counts of rows add up to a corpus.

sacreBLEU's own formulas are repeated here for many sums at once, which a bootstrap needs; tests hold them equal to 1e-6.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

ORDERS = 4  # n-grams of BLEU
BETA = 2.0  # chrF weighs recall twice
ROUGE = ("rouge1", "rouge2", "rougeL")


def bleu_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """sacreBLEU's counts [rows, 10]: lengths of answer and reference, matches of 1- to 4-grams, n-grams of the answer."""
    return np.array(_bleu()._extract_corpus_statistics(predictions, [references]), dtype=np.float64)


def bleu_total(sums: np.ndarray) -> np.ndarray:
    """BLEU in 0-1 of sums [..., 10], with sacreBLEU's default smoothing: no match counts 1/2, 1/4, … of one."""
    ours, theirs, matched, counted = sums[..., 0], sums[..., 1], sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    with np.errstate(divide="ignore", invalid="ignore"):
        halvings = np.cumsum(matched == 0, axis=-1)
        precision = np.where(matched == 0, 0.5**halvings, matched) / counted
        brevity = np.exp(np.minimum(0.0, 1 - theirs / ours))
        score = brevity * np.exp(np.log(precision).mean(-1))
    some = (matched > 0).any(-1) & (counted > 0).all(-1) & (ours > 0)
    found: np.ndarray = np.where(some, score, 0.0)
    return found


def chrf_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """sacreBLEU's counts [rows, 18]: for 1 to 6 characters, n-grams of the answer, of the reference, and matches."""
    return np.array(_chrf()._extract_corpus_statistics(predictions, [references]), dtype=np.float64)


def chrf_total(sums: np.ndarray) -> np.ndarray:
    """chrF in 0-1 of sums [..., 18]: F2 of precision and recall, each the mean over the orders that both texts have."""
    ours, theirs, matched = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    both = (ours > 0) & (theirs > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (np.where(both, matched / part, 0.0).sum(-1) / np.maximum(both.sum(-1), 1) for part in (ours, theirs))
        score = (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
    found: np.ndarray = np.where(precision + recall > 0, score, 0.0)
    return found


def rouge_rows(predictions: list[str], references: list[str]) -> np.ndarray:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of each row by rouge-score, [rows, 3]."""
    scorer = _rouge()
    scores = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return np.array([[score[name].fmeasure for name in ROUGE] for score in scores], dtype=np.float64).reshape(-1, len(ROUGE))


def bleu_signature() -> str:
    return f"sacreBLEU {_signature(_bleu())}"


def chrf_signature() -> str:
    return f"sacreBLEU {_signature(_chrf())}"


def rouge_signature() -> str:
    return f"rouge-score|F1, mean over rows|stemmer:no|tokens:a-z and 0-9, lower case|version:{version('rouge-score')}"


def _signature(metric: Any) -> str:
    metric.corpus_score(["a b c d"], [["a b c d"]])  # only then it knows how many references there are
    return str(metric.get_signature())


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU()


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=False)
