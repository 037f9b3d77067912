"""One side of a comparison: a model asked and measured. Both sides go through the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.evaluation.asking import Prompt, general_tokens, prompts_of
from llm_finetune_kit.evaluation.losses import RowLosses, row_losses
from llm_finetune_kit.generation import Answer, Speed, answers


@dataclass(frozen=True)
class Questions:
    """Held-out rows and general texts as a tokenizer has them, and prompts made of the rows."""

    held_out: Tokens
    general: Tokens
    prompts: list[Prompt]
    chat: Any
    tokenizer: str  # the fingerprint of tokenizer and template
    left_out: int = 0  # rows that are too long to be asked

    @classmethod
    def of(cls, held_out: Tokens, chat: Any, *, positions: int, seed: int, left_out: int = 0) -> Questions:
        """All that both sides are asked; `positions` is the model's limit."""
        general, prompts = general_tokens(chat, positions), prompts_of(held_out, chat, seed)
        return cls(held_out, general, prompts, chat, chat.fingerprint(), left_out)

    @classmethod
    def asking(cls, texts: list[str], chat: Any, *, positions: int) -> Questions:
        """Prompts without reference answers, and no rows."""
        nothing = np.zeros(0, dtype=np.int32)
        rows = Tokens(nothing, nothing.astype(bool), np.zeros(1, dtype=np.int64), nothing)
        prompts = [
            Prompt(number, chat.prompt_ids([{"role": "user", "content": text}]), text, "") for number, text in enumerate(texts)
        ]
        return cls(rows, general_tokens(chat, positions), prompts, chat, chat.fingerprint())


@dataclass(frozen=True)
class Side:
    """What a model made of the questions; `answers` are those to the first prompts."""

    name: str
    tokenizer: str
    losses: RowLosses
    general: RowLosses
    answers: list[Answer]
    speed: Speed


def side(name: str, objective: Any, asked: Questions, how: GenerationSection, *, prompts: list[Prompt], seed: int) -> Side:
    """Measure a model on all rows and have it answer the prompts."""
    speed = Speed()
    return Side(
        name,
        asked.tokenizer,
        row_losses(objective, asked.held_out, asked.chat),
        row_losses(objective, asked.general, asked.chat),
        said(objective, asked, how, prompts, seed=seed, speed=speed),
        speed,
    )


def said(
    objective: Any,
    asked: Questions,
    how: GenerationSection,
    prompts: list[Prompt],
    *,
    seed: int,
    speed: Speed | None = None,
) -> list[Answer]:
    """The model's answers to the prompts, computed in the objective's precision."""
    with objective.precision():
        return answers(objective.model, asked.chat, [prompt.ids for prompt in prompts], how, seed=seed, speed=speed)
