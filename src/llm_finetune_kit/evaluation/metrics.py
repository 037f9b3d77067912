"""The table of metrics: for each, what it counts in a row, what the counts of many rows add up to, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llm_finetune_kit.errors import ConfigError, nearest
from llm_finetune_kit.evaluation import overlap, text_counts
from llm_finetune_kit.evaluation.bootstrap import ANY, Range, Total
from llm_finetune_kit.generation import Answer

FROM_LOSS = ("perplexity", "bits_per_byte")  # of the reference answers' tokens; nothing is generated for them
SHORT = 5  # words of a median reference up to which an answer can be expected to match it word for word
OURS = "llm-finetune-kit"


@dataclass(frozen=True)
class Said:
    """Answers of one model to some prompts, and the reference answers."""

    answers: list[Answer]
    references: list[str]

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]

    @cached_property
    def rouge(self) -> np.ndarray:
        return overlap.rouge_rows(self.texts, self.references)


@dataclass(frozen=True)
class Metric:
    """`rows` gives counts [rows, k] that add up, `total` the metric's value of their sums [..., k].

    `whole` is given instead of `rows` where counts of rows do not add up; there is no interval then. `better` is
    1 (higher), -1 (lower) or 0 (neither: it only describes); `limits` are the least and the most that it can be.
    """

    name: str
    label: str
    better: int
    signature: Callable[[], str]
    rows: Callable[[Said], np.ndarray] | None = None
    total: Total | None = None
    whole: Callable[[Said], float] | None = None
    needs_reference: bool = True
    limits: Range = (0.0, 1.0)

    def value(self, said: Said) -> float:
        """The metric over all answers."""
        if self.whole is not None:
            return float(self.whole(said))
        assert self.rows is not None and self.total is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(self.total(self.rows(said).sum(0)))


def share(sums: np.ndarray) -> np.ndarray:
    """The first of two sums over the second."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = sums[..., 0] / sums[..., 1]
    return found


def mean_of(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Counts [rows, 2] whose share is the mean of the values."""
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)


def _own(words: str) -> Callable[[], str]:
    return lambda: f"{OURS}|{words}"


def _rouge(column: int) -> Callable[[Said], np.ndarray]:
    return lambda said: mean_of(said.rouge[:, column])


def _described(
    name: str, label: str, better: int, words: str, rows: Callable[[list[Answer]], np.ndarray], most: float = 1.0
) -> Metric:
    def counts(said: Said) -> np.ndarray:
        return rows(said.answers)

    return Metric(name, label, better, _own(words), counts, share, needs_reference=False, limits=(0.0, most))


def _distinct(n: int) -> Metric:
    words = f"different {n}-grams of words over all {n}-grams, all answers together"
    return Metric(
        f"distinct_{n}",
        f"Distinct-{n}",
        0,
        _own(words),
        whole=lambda said: text_counts.distinct(said.texts, n),
        needs_reference=False,
    )


def _bertscore(said: Said) -> np.ndarray:
    from llm_finetune_kit.evaluation.bertscore import bertscore_rows

    return mean_of(bertscore_rows(said.texts, said.references))


def _bertscore_signature() -> str:
    from llm_finetune_kit.evaluation.bertscore import bertscore_signature

    return bertscore_signature()


TABLE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "bleu",
            "BLEU",
            1,
            overlap.bleu_signature,
            lambda said: overlap.bleu_rows(said.texts, said.references),
            overlap.bleu_total,
        ),
        Metric(
            "chrf",
            "chrF",
            1,
            overlap.chrf_signature,
            lambda said: overlap.chrf_rows(said.texts, said.references),
            overlap.chrf_total,
        ),
        Metric("rouge1", "ROUGE-1", 1, overlap.rouge_signature, _rouge(0), share),
        Metric("rouge2", "ROUGE-2", 1, overlap.rouge_signature, _rouge(1), share),
        Metric("rougeL", "ROUGE-L", 1, overlap.rouge_signature, _rouge(2), share),
        Metric(
            "exact_match",
            "Exact match",
            1,
            _own("equal but for white space"),
            lambda said: mean_of(text_counts.exact(said.texts, said.references)),
            share,
        ),
        Metric(
            "numeric_match",
            "Numeric answer match",
            1,
            _own("the number after ####, else the last number"),
            lambda said: text_counts.numeric(said.texts, said.references),
            share,
        ),
        Metric("bertscore", "BERTScore", 1, _bertscore_signature, _bertscore, share, limits=(-math.inf, 1.0)),
        _distinct(1),
        _distinct(2),
        _described("length", "Length in words", 0, "mean number of words", text_counts.length, math.inf),
        _described("stop_rate", "Ended by itself", 1, "share of answers with an end token", text_counts.stopped),
        _described(
            "repetition",
            "Repetition",
            -1,
            "share of 4-grams of words that repeat one of the same answer",
            text_counts.repeated,
        ),
    )
}


def chosen(names: Sequence[Any] | None, references: list[str]) -> list[Metric]:
    """The asked metrics, or those that suit the reference answers. An item may be a name, a function or a `Metric`.

    Without references only what needs none is left. Raises ConfigError for a name that is not known.
    """
    some = any(text.strip() for text in references)
    if names is None:
        names = [*(fitting(references) if some else []), "length", "stop_rate", "repetition", "distinct_2"]
    found = [_metric(one) for one in names if one not in FROM_LOSS]
    return [metric for metric in found if some or not metric.needs_reference]


def fitting(references: list[str]) -> list[str]:
    """The names of the reference metrics that suit these answers."""
    names = ["bleu", "chrf", *overlap.ROUGE]
    if sum("####" in text for text in references) > len(references) / 2:
        names.insert(0, "numeric_match")
    if np.median([len(text.split()) for text in references]) <= SHORT:
        names.insert(0, "exact_match")
    return names


def _metric(one: Any) -> Metric:
    if isinstance(one, Metric):
        return one
    if callable(one) or callable(getattr(one, "compute_metric", None)):
        return custom(one)
    if one not in TABLE:
        near = nearest(str(one), [*TABLE, *FROM_LOSS])
        fix = f"did you mean {near[0]}?" if near else f"metrics: {', '.join([*FROM_LOSS, *TABLE])}"
        raise ConfigError(70, f"there is no metric {one}", where="metrics", fix=fix)
    return TABLE[one]


def custom(function: Any, *, name: str | None = None, better: int = 1) -> Metric:
    """A metric of one's own: a function (predictions, references) -> float, or an object with such a `compute_metric`.

    Where its value is the mean of its values on single rows it gets an interval, else it has none.
    """
    compute: Callable[[list[str], list[str]], float] = getattr(function, "compute_metric", function)
    known = str(name or getattr(function, "__name__", type(function).__name__))

    def rows(said: Said) -> np.ndarray:
        return mean_of([float(compute([text], [wanted])) for text, wanted in zip(said.texts, said.references, strict=True)])

    def whole(said: Said) -> float:
        return float(compute(said.texts, said.references))

    return Metric(known, known, better, _own("a function of your own"), rows, share, whole, limits=ANY)


def adds_up(metric: Metric, *sides: Said) -> bool:
    """Whether the metric is a function of sums over rows, so that it has an interval."""
    if metric.rows is None or metric.total is None:
        return False
    if metric.whole is None:
        return True
    try:
        parts = [(float(metric.total(metric.rows(said).sum(0))), metric.whole(said)) for said in sides]
    except Exception:  # a function of the user's own that cannot be asked about one row alone
        return False
    return all(abs(by_rows - whole) <= 1e-9 * max(1.0, abs(whole)) for by_rows, whole in parts)
