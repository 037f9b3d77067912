"""What base and tuned are both asked: prompts out of held-out rows, and general texts that belong to no training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from llm_finetune_kit.data.formats.rows import Example
from llm_finetune_kit.data.masks import Tokens, encode
from llm_finetune_kit.plan.speed import LAYER_CALLS, MOST_ANSWERED, READING, prompts_within

GENERAL = "general.jsonl"  # 20 short texts and 20 questions with answers, written for this project
ALL = "all there are"
FIRST_WORDS = 16  # tokens of a raw text that are given for the model to go on with


@dataclass(frozen=True)
class Prompt:
    """What a held-out row asks: its number, the ids to go on from, their text, and the reference answer (may be empty)."""

    row: int
    ids: list[int]
    text: str
    reference: str


def prompts_of(tokens: Tokens, chat: Any, seed: int) -> list[Prompt]:
    """Prompts of the rows in an order that depends on the seed alone, MOST_ANSWERED at most; a row asks once."""
    generator = np.random.Generator(np.random.PCG64([seed, 1 << 29]))
    found: dict[int, Prompt] = {}
    for index in generator.permutation(len(tokens)):
        prompt = _prompt(tokens, chat, int(index))
        if prompt is not None:
            found.setdefault(prompt.row, prompt)
        if len(found) == MOST_ANSWERED:
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


def how_many(there: int, asked: int | None, usual: int) -> tuple[int, str]:
    """How many of the prompts that are there both models are to answer, and why: as asked, all, or `usual`."""
    count = min(there, usual if asked is None else asked)
    if count == there:
        return count, ALL
    return count, "as many as were asked for" if asked is not None else "about a minute's worth on a usual machine"


def usual_count(model: Any, new_tokens: int, seconds: float) -> int:
    """How many prompts two models of this size answer in that time on a usual machine, however busy this one is."""
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    layers = int(model.config.get_text_config().num_hidden_layers)
    alone = new_tokens * (held / READING[next(model.parameters()).device.type] + layers * LAYER_CALLS)
    return prompts_within(seconds, alone)
