"""What is odd about answers and how they go with their prompts: echoes, one answer for many prompts, opposite labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_finetune_kit.data.similar import answers_of, normal, said, words

LONG_ENOUGH = 20  # characters of an answer that two prompts do not share by chance, as "yes" or "positive" would be
MANY = 5  # rows, and
MANY_SHARE = 0.0005  # share of all rows, from which one answer counts as given to many prompts


def about_answers(examples: Sequence[Any], repeats: set[int]) -> Iterator[tuple[str, list[int], str]]:
    """Kind of finding, its examples and a detail. `repeats` are exact duplicates, whose answers of course are the same."""
    short, echoes, same_pair = [], [], []
    hashes = np.zeros(len(examples), dtype=np.int64)
    for place, example in enumerate(examples):
        if example.messages is None:
            continue
        final = said(example.messages[-1])
        if len(final) <= LONG_ENOUGH and _is_one_word(answers_of(example)):
            short.append(place)
        elif len(final) > LONG_ENOUGH and place not in repeats:
            answer = hash(normal(final))
            asked = [said(message) for message in example.messages[:-1] if message["role"] == "user"]
            if len(asked) == 1:  # the last words of a long talk are often the same
                hashes[place] = answer
            if asked and len(asked[-1]) > LONG_ENOUGH and hash(normal(asked[-1])) == answer:
                echoes.append(place)
        if example.rejected and _contents(example.messages[-len(example.rejected) :]) == _contents(example.rejected):
            same_pair.append(place)
    yield "short_answers", short, ""
    yield "answer_is_prompt", echoes, ""
    yield "chosen_is_rejected", same_pair, ""
    yield "repeated_answer", *_repeated(examples, hashes)
    yield "contradicting_labels", _contradictions(examples), ""


def _is_one_word(answer: str) -> bool:
    return len(answer.split()) <= 1 and len(words(answer)) <= 1


def _contents(messages: Sequence[dict[str, Any]]) -> list[str]:
    return [normal(said(message)) for message in messages]


def _repeated(examples: Sequence[Any], hashes: np.ndarray) -> tuple[list[int], str]:
    """Examples whose answer many others give as well, and the commonest of these answers."""
    values, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    many = (counts >= max(MANY, MANY_SHARE * len(examples))) & (values != 0)
    found = np.flatnonzero(many[which])
    if not len(found):
        return [], ""
    commonest = int(np.argmax(np.where(many, counts, 0)))
    answer = " ".join(said(examples[int(np.flatnonzero(which == commonest)[0])].messages[-1]).split())
    return found.tolist(), f"{counts[commonest]:,} times: {answer[:60]}{'…' if len(answer) > 60 else ''}"


def _contradictions(examples: Sequence[Any]) -> list[int]:
    """Examples that are rated one way and earlier, word for word, the other way."""
    labels: dict[int, bool] = {}
    found = []
    for place, example in enumerate(examples):
        if example.label is not None and example.messages is not None:
            key = hash(tuple(_contents(example.messages)))
            if labels.setdefault(key, example.label) != example.label:
                found.append(place)
    return found


def about_prompts(examples: Sequence[Any], held_out: Sequence[Any]) -> list[tuple[int, int]]:
    """(example, held-out example) for each held-out one whose whole prompt is also asked in the examples."""
    asked = {key: place for place, example in enumerate(examples) if (key := _prompt(example)) is not None}
    return [(asked[key], place) for place, example in enumerate(held_out) if (key := _prompt(example)) in asked]


def _prompt(example: Any) -> int | None:
    """Hash of all that stands before the last answer; None where there is none, or too little to mean anything."""
    if example.messages is None:
        return None
    before = "\n".join(said(message) for message in example.messages[:-1] if message["role"] != "system")
    return hash(normal(before)) if len(before) > LONG_ENOUGH else None
