"""Near copies among texts, and copies across what is trained on and what is held out, verified on their shingles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_finetune_kit.data.similar import CHUNK, bands, candidates, estimates, exact_hashes, normal, shingles, similarity, sketch

MARGIN = 0.12  # how far below the threshold an estimate may lie: at 0.8, 64 entries have a standard deviation of 0.05
ANSWERS_ALIKE = 0.5  # least similarity of the answers of two copies; short answers leave little to share
MOST_ROUNDS = 50


def near_duplicates(
    texts: Sequence[str],
    threshold: float = 0.8,
    *,
    answers: Sequence[str] | None = None,
    sketches: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> list[tuple[int, int, float]]:
    """(earlier row, later row, exact similarity) for every row that is nearly an earlier row which is not such a copy.

    Leaving out all later rows leaves nothing that a second call would find. Only `rows` (all by default) are looked
    at; exact copies are found too. With `answers` these must be alike as well: another question about the same long
    passage is no copy.
    """
    sketches = sketch(texts) if sketches is None else sketches
    rows = np.arange(len(texts)) if rows is None else rows
    verified = _Verified(texts, threshold, answers)
    copies: list[tuple[int, int, float]] = []
    for _ in range(MOST_ROUNDS):
        found: dict[int, list[tuple[int, float]]] = {}
        for first, second in candidates(sketches, threshold - MARGIN, rows):
            for earlier, later in zip(first.tolist(), second.tolist(), strict=True):
                if alike := verified(earlier, later):
                    found.setdefault(later, []).append((earlier, alike))
        new: dict[int, tuple[int, int, float]] = {}
        for later in sorted(found):
            kept = [(earlier, alike) for earlier, alike in found[later] if earlier not in new]
            if kept:
                new[later] = (kept[0][0], later, kept[0][1])
        if not new:
            break
        copies += new.values()
        rows = np.setdiff1d(rows, np.fromiter(new, dtype=np.int64), assume_unique=True)
    return sorted(copies, key=lambda pair: pair[1])


class _Verified:
    """Exact similarity of two texts where it reaches the threshold, and that of their answers its own, else 0."""

    def __init__(self, texts: Sequence[str], threshold: float, answers: Sequence[str] | None) -> None:
        self.texts, self.threshold, self.answers = texts, threshold, answers
        self.known: dict[tuple[int, int], float] = {}  # each pair is computed once
        self.sets: dict[int, frozenset[tuple[str, ...]]] = {}

    def __call__(self, first: int, second: int) -> float:
        if (first, second) not in self.known:
            alike = similarity(self._set(first), self._set(second))
            good = alike >= self.threshold and (self.answers is None or self._same_answer(self.answers, first, second))
            self.known[first, second] = alike if good else 0.0
        return self.known[first, second]

    def _same_answer(self, answers: Sequence[str], first: int, second: int) -> bool:
        return similarity(shingles(answers[first]), shingles(answers[second])) >= ANSWERS_ALIKE

    def _set(self, row: int) -> frozenset[tuple[str, ...]]:
        if row not in self.sets:
            if len(self.sets) >= CHUNK:
                self.sets.clear()
            self.sets[row] = shingles(self.texts[row])
        return self.sets[row]


def copies_across(
    known: Sequence[str],
    new: Sequence[str],
    threshold: float = 0.8,
    *,
    answers: tuple[Sequence[str], Sequence[str]] | None = None,
    sketches: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[tuple[int, int, float]]:
    """(row of `known`, row of `new`, exact similarity) for each text of `new` that `known` holds too, exactly or nearly.

    This is how leakage is found: `known` is what is trained on, `new` what is held out.
    """
    ours, theirs = sketches or (sketch(known), sketch(new))
    both, size = np.concatenate([ours, theirs]), len(ours)
    verified = _Verified(_Joined(known, new), threshold, _Joined(*answers) if answers else None)
    best = {size + row: (twin, 1.0) for row, twin in _twins(known, new)}
    for key, order in bands(both):
        for first, second in _across(key[order], order, size):
            close = estimates(both, first, second) >= threshold - MARGIN
            for row, other in zip(first[close].tolist(), second[close].tolist(), strict=True):
                alike = verified(row, other)
                if alike > best.get(other, (0, 0.0))[1]:
                    best[other] = (row, alike)
    return [(row, other - size, alike) for other, (row, alike) in sorted(best.items())]


def _twins(known: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(row of `new`, first row of `known` that says the same word for word)"""
    first: dict[int, int] = {}
    for row, value in enumerate(exact_hashes(known).tolist()):
        first.setdefault(value, row)
    for row, value in enumerate(exact_hashes(new).tolist()):
        if value in first and normal(known[first[value]]) == normal(new[row]):
            yield row, first[value]


def _across(key: np.ndarray, order: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row from `size` on with the nearest row below `size` before it and after it, if they share its bucket."""
    for step in (1, -1):
        key, order = key[::step], order[::step]
        at = np.arange(len(order))
        nearest = np.maximum.accumulate(np.where(order < size, at, -1))
        held = at[(order >= size) & (nearest >= 0)]
        held = held[key[held] == key[nearest[held]]]
        yield order[nearest[held]], order[held]


class _Joined(Sequence[str]):
    """Two sequences of texts as one, copied nowhere."""

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: Any) -> Any:
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]
