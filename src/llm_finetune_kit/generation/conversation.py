"""A talk with a model over many turns: what was said, which of its sides answers, and what it can still see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import KitError
from llm_finetune_kit.generation import positions
from llm_finetune_kit.generation.stream import stream


class Conversation:
    """What was said so far. `opened` is an `opening.Opened`; `tuned` says which side of an adapter answers.

    The model reads at most `reads` tokens. What does not fit is forgotten from the beginning, a question with its
    answers at a time; the system message stays.
    """

    def __init__(self, opened: Any, how: GenerationSection, *, system: str = "", seed: int = 0) -> None:
        self.opened = opened
        self.reads = positions(opened.model)
        self.how = how.model_copy(update={"max_new_tokens": max(1, min(how.max_new_tokens, self.reads // 2))})
        self.system = system
        self.seed = seed
        self.tuned = True
        self.messages: list[dict[str, Any]] = []

    @property
    def answers(self) -> str:
        """Who answers: tuned or base where the model has both sides, else model."""
        return ("tuned" if self.tuned else "base") if self.opened.is_adapter else "model"

    def forget(self) -> None:
        """Begin anew, with the same system message."""
        self.messages = []

    def hear(self, text: str) -> int:
        """Take a question; returns how many earlier messages had to be forgotten.

        Raises ModelError if the template refuses it; nothing is heard then.
        """
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            while len(self._ids()) > self._room and (turns := self._turns())[1:]:
                del self.messages[: turns[1]]
        except KitError:  # the template refuses it
            del self.messages[-1:]
            raise
        return before + 1 - len(self.messages)

    @property
    def overflows(self) -> bool:
        """Whether the newest question alone is longer than what the model can read; its beginning is then cut off."""
        return len(self._ids()) > self._room

    def answer(self) -> Iterator[str]:
        """Pieces of the answer to what was heard last. Whoever stops listening stops it; what was said counts as said."""
        said: list[str] = []
        opened = self.opened
        try:
            with self._side():
                ids = self._ids()
                for piece in stream(
                    opened.model, opened.chat, ids, self.how, seed=self.seed, precision=opened.objective.precision
                ):
                    said.append(piece)
                    yield piece
        finally:
            if text := "".join(said).strip():
                self.messages.append({"role": "assistant", "content": text})
            else:  # two questions in a row are no conversation
                del self.messages[-1:]

    @property
    def _room(self) -> int:
        return self.reads - self.how.max_new_tokens

    def _side(self) -> AbstractContextManager[Any]:
        off = self.opened.is_adapter and not self.tuned
        return self.opened.model.disable_adapter() if off else nullcontext()

    def _ids(self) -> list[int]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return list(self.opened.chat.prompt_ids([*first, *self.messages]))

    def _turns(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "user"]
