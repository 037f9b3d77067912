"""An answer piece by piece, while the model is still at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import Queue
from threading import Thread
from typing import Any

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.generation import Speed, continued, fitted, stop_ids
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
) -> Iterator[str]:
    """Pieces of the answer that `answer` gives whole (but for white space around it), as they are made.

    The model works in a thread of its own, inside `precision`; whoever stops listening stops it. Raises UsageError
    for beam search, which knows its answer only at the end.
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
    """Text as soon as it is whole letters. Each piece is decoded after the one before it, as some tokens join."""
    ids: list[int] = []
    start = read = 0
    while (heard := said.get()) is not None:
        if isinstance(heard, BaseException):
            raise heard
        if heard in stops:
            continue
        ids.append(heard)
        before, now = chat.decode(ids[start:read]), chat.decode(ids[start:])
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            yield now[len(before) :]
            start, read = read, len(ids)
    rest = chat.decode(ids[start:])[len(chat.decode(ids[start:read])) :]
    if rest:
        yield rest
