"""Figures of answers by themselves and against short references: matches, length, ends, repetition, variety."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

import numpy as np

from llm_finetune_kit.generation import Answer

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARK = "####"  # stands before the final number in GSM8K
REPEATED = 4  # words of what counts as a repetition (seq-rep-4 of Welleck et al. 2020)


def exact(predictions: list[str], references: list[str]) -> list[float]:
    """1 for each answer that equals its reference but for white space."""
    return [float(a.split() == b.split()) for a, b in zip(predictions, references, strict=True)]


def numeric(predictions: list[str], references: list[str]) -> np.ndarray:
    """Right answers and rows that have a number to get right, [rows, 2]."""
    found = []
    for text, reference in zip(predictions, references, strict=True):
        wanted = final_number(reference)
        found.append([float(wanted is not None and final_number(text) == wanted), float(wanted is not None)])
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or else the last number of the text; thousands may have commas."""
    _, mark, tail = text.rpartition(MARK)
    numbers = NUMBER.findall(tail)
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def length(answers: list[Answer]) -> np.ndarray:
    """Words and a one, [rows, 2]."""
    return np.array([[len(answer.text.split()), 1] for answer in answers], dtype=np.float64).reshape(-1, 2)


def stopped(answers: list[Answer]) -> np.ndarray:
    """Whether it ended by itself, and a one, [rows, 2]."""
    return np.array([[answer.stopped, 1] for answer in answers], dtype=np.float64).reshape(-1, 2)


def repeated(answers: list[Answer]) -> np.ndarray:
    """4-grams that occurred before in the same answer, and all of them, [rows, 2]."""
    grams = [_grams(answer.text, REPEATED) for answer in answers]
    return np.array([[len(one) - len(set(one)), len(one)] for one in grams], dtype=np.float64).reshape(-1, 2)


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams over all n-grams of all texts together (Li et al. 2016)."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))
