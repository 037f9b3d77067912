"""Base and tuned answer side by side. One model is kept open; questions wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.files import MANIFEST, read_json
from llm_finetune_kit.folder import RunFolder

SIDES = ("tuned", "base")  # in the order they are asked
LOADING = "loading"  # where a turn is at before the first side begins
LONGEST = 4_000  # letters of a question
MOST_TURNS = 20
MOST_NEW_TOKENS = 512


@dataclass
class Turn:
    """A question and the answers so far; None for a side that has not begun."""

    question: str
    answers: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(SIDES))
    at: str = ""


class Answering:
    """Opens a run's model when it is asked and keeps it until another is."""

    def __init__(self) -> None:
        self._turn = Lock()
        self._open: dict[str, Any] = {}
        self._key: Any = None

    def ask(self, run: RunFolder, turns: list[Turn], question: str, how: GenerationSection) -> Iterator[list[Turn]]:
        """The conversation with the answers of both sides growing. Raises UsageError, and what opening a model raises."""
        question = question.strip()
        if not question:
            raise UsageError(55, "there is no question", fix="write one")
        if len(question) > LONGEST:
            why = f"it has {len(question):,} letters, and a question may have {LONGEST:,}"
            raise UsageError(55, "the question is too long", why=why, fix="write a shorter one")
        if len(turns) >= MOST_TURNS:
            why = f"a conversation may have {MOST_TURNS} questions"
            raise UsageError(55, "the conversation is too long", why=why, fix="press Start over")
        turns = [*turns, Turn(question)]
        yield turns
        with self._turn:
            turns[-1].at = LOADING
            yield turns
            opened = self._opened(run)
            for side in SIDES:
                turns[-1].at, turns[-1].answers[side] = side, ""
                for part in self._pieces(opened, side, turns, how):
                    turns[-1].answers[side] = f"{turns[-1].answers[side]}{part}"
                    yield turns
        turns[-1].at = ""
        yield turns

    def _pieces(self, opened: dict[str, Any], side: str, turns: list[Turn], how: GenerationSection) -> Iterator[str]:
        from llm_finetune_kit.generation.stream import stream
        from llm_finetune_kit.models.adapters import without_adapter

        one = opened[side]
        messages = [message for turn in turns[:-1] for message in _said(turn, side)]
        ids = one.chat.prompt_ids([*messages, {"role": "user", "content": turns[-1].question}])
        with without_adapter(one.model) if side == "base" and one.is_adapter else nullcontext():
            yield from stream(one.model, one.chat, ids, how, precision=one.objective.precision)

    def _opened(self, run: RunFolder) -> dict[str, Any]:
        """The run's model as both sides use it: an adapter that can be switched off, else two models."""
        key = (run.path, (run.final / MANIFEST).stat().st_mtime_ns)
        if key != self._key:
            self._open, self._key = {}, None  # the one before makes room first
            from llm_finetune_kit.beginning import RESOLVED
            from llm_finetune_kit.opening import open_here

            tuned = open_here(os.path.relpath(run.final))  # faults then name no folder of the machine
            base = tuned if tuned.is_adapter else open_here(str(read_json(run.path / RESOLVED)["base_model"]))
            self._open, self._key = {"tuned": tuned, "base": base}, key
        return self._open


def _said(turn: Turn, side: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answers[side] or ""}]
