"""What base and tuned are both asked: prompts out of held-out rows, and general texts that belong to no training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from llm_finetune_kit.data.formats.rows import Example
from llm_finetune_kit.data.masks import Tokens, encode

GENERAL = "general.jsonl"  # 20 short texts and 20 questions with answers, written for this project
FIRST_WORDS = 16  # tokens of a raw text that are given for the model to go on with
MOST_PROMPTS = 256  # intervals hardly get narrower for what more would cost
TRIED = 4  # prompts that show how long one takes


@dataclass(frozen=True)
class Prompt:
    """What a held-out row asks: its number, the ids to go on from, their text, and the reference answer (may be empty)."""

    row: int
    ids: list[int]
    text: str
    reference: str


def prompts_of(tokens: Tokens, chat: Any, seed: int) -> list[Prompt]:
    """Prompts of the rows in an order that depends on the seed alone, MOST_PROMPTS at most; a row asks once."""
    generator = np.random.Generator(np.random.PCG64([seed, 1 << 29]))
    found: dict[int, Prompt] = {}
    for index in generator.permutation(len(tokens)):
        prompt = _prompt(tokens, chat, int(index))
        if prompt is not None:
            found.setdefault(prompt.row, prompt)
        if len(found) == MOST_PROMPTS:
            break
    return list(found.values())


def _prompt(tokens: Tokens, chat: Any, index: int) -> Prompt | None:
    """All before the first answer of an example, and that answer; of a raw text its first words, and no reference."""
    ids, trained = tokens.example(index)
    learned = np.flatnonzero(trained)
    if not len(learned):
        return None
    first = int(learned[0])
    if first == 0:
        asked = ids[: min(FIRST_WORDS, max(1, len(ids) // 2))].tolist()
        return Prompt(int(tokens.rows[index]), asked, chat.decode(asked).strip(), "")
    last = first + int(np.argmin(np.append(trained[first:], False)))
    asked, answer = ids[:first].tolist(), ids[first:last].tolist()
    return Prompt(int(tokens.rows[index]), asked, chat.decode(asked).strip(), chat.decode(answer).strip())


def general_tokens(chat: Any, positions: int) -> Tokens:
    """The general set under a tokenizer: texts learned whole, and questions in its template of which the answers count."""
    lines = files("llm_finetune_kit").joinpath("assets", GENERAL).read_text(encoding="utf-8").splitlines()
    examples = [_example(number, json.loads(line)) for number, line in enumerate(lines)]
    refused: list[tuple[int, str]] = []  # by a template that takes no such conversation
    return encode(examples, chat, refused=refused).cut(positions)[0]


def _example(number: int, row: dict[str, str]) -> Example:
    if "text" in row:
        return Example(None, row["text"], number)
    asked, answer = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}
    return Example([asked, answer], None, number)


def how_many(ask: Callable[[list[Prompt]], Any], prompts: list[Prompt], asked: int | None, seconds: float) -> tuple[int, str]:
    """How many prompts both models are to answer, and why: as asked, all, or what `seconds` allow.

    The first few are answered once to see how long a prompt takes; in larger batches it takes less.
    """
    if asked is not None:
        return min(asked, len(prompts)), "as many as you asked for" if asked <= len(prompts) else "all there are"
    if len(prompts) <= TRIED:
        return len(prompts), "all there are"
    started = time.perf_counter()
    ask(prompts[:TRIED])
    each = (time.perf_counter() - started) / TRIED
    count = min(len(prompts), max(TRIED, int(seconds / (2 * each))))
    if count == len(prompts):
        return count, "all there are"
    return count, f"a prompt takes {each:.2f} s here, and both models may take {seconds:.0f} s; set evaluation.rows for more"
