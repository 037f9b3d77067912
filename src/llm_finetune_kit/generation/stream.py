"""An answer piece by piece, while the model is still at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import Queue
from threading import Thread
from typing import Any

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.generation import Answer, Speed, continued, fitted, stop_ids
from llm_finetune_kit.generation.clock import Clock
from llm_finetune_kit.models.tokenizer import ChatTokenizer

UNFINISHED = "\ufffd"  # stands for the first bytes of a letter whose last ones are in a later token


def stream(
    model: Any,
    chat: ChatTokenizer,
    prompt_ids: list[int],
    how: GenerationSection,
    *,
    seed: int = 0,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    speed: Speed | None = None,
    ended: Callable[[Answer], object] | None = None,
) -> Iterator[str]:
    """Pieces of the answer that `answer` gives whole (but for white space around it), as they are made.

    The model works in a thread of its own, inside `precision`; whoever stops listening stops it. `speed` is
    counted and `ended` is given the whole answer at its end. Raises UsageError for beam search, which knows its answer
    only then.
    """
    if how.num_beams > 1:
        raise UsageError(12, "beam search cannot be streamed", where="num_beams", fix="set num_beams=1, or do not stream")
    said: Queue[int | BaseException | None] = Queue()
    wanted = [True]

    def hear(newest: list[int]) -> bool:
        said.put(newest[0])
        return wanted[0]

    def work() -> None:
        try:
            prompt, clock = fitted(model, [prompt_ids], how), Clock(hear)
            with precision():
                done = continued(model, chat, prompt, how, seed=seed, clock=clock)
            if speed is not None:
                speed.add(clock, len(prompt[0]), done[0].tokens - 1)
            if ended is not None:
                ended(done[0])
            said.put(None)
        except BaseException as error:  # told to the listener, in whose thread it can be handled
            said.put(error)

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from _pieces(chat, said, set(stop_ids(model, chat)))
    finally:
        wanted[0] = False
        worker.join()


def _pieces(chat: ChatTokenizer, said: Queue[int | BaseException | None], stops: set[int]) -> Iterator[str]:
    letters = Letters(chat, stops)
    while (heard := said.get()) is not None:
        if isinstance(heard, BaseException):
            raise heard
        piece = letters.add(heard)
        if piece:
            yield piece
    rest = letters.rest()
    if rest:
        yield rest


class Letters:
    """Text of tokens as they come, as soon as it is whole letters; `stops` have no text.

    Each piece is decoded after the one before it, as some tokens join.
    """

    def __init__(self, chat: ChatTokenizer, stops: set[int]) -> None:
        self._chat, self._stops = chat, stops
        self._ids: list[int] = []
        self._start = self._read = 0

    def add(self, index: int) -> str:
        """What became readable with this token (may be empty)."""
        if index in self._stops:
            return ""
        self._ids.append(index)
        piece = self._unread()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return piece

    def rest(self) -> str:
        """What is left at the end, letters that were never finished among it."""
        return self._unread()

    def _unread(self) -> str:
        before = self._chat.decode(self._ids[self._start : self._read])
        return self._chat.decode(self._ids[self._start :])[len(before) :]
