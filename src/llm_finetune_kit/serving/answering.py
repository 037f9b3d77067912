"""Answers, one after the other: a thread that has the model, and a short line of requests before it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.generation import continued, stop_ids
from llm_finetune_kit.generation.clock import Clock
from llm_finetune_kit.generation.stream import Letters
from llm_finetune_kit.hardware import release_memory
from llm_finetune_kit.models.adapters import without_adapter
from llm_finetune_kit.opening import Opened
from llm_finetune_kit.serving.exchange import Refusal

MOST_WAITING = 64
BASE = "base"


@dataclass(frozen=True)
class Answered:
    """How a request ended. `reason` is stop, length, left (the client went away) or failed."""

    model: str
    prompt_tokens: int
    tokens: int
    seconds: float
    reason: str


class Job:
    """A request in line. `pieces` gets the text of its answer as it is made, and at the end an `Answered`."""

    def __init__(self, model: str, prompt: list[int], how: GenerationSection, *, seed: int, stops: list[str]) -> None:
        self.model, self.prompt, self.how, self.seed = model, prompt, how, seed
        self.cut = Cut(stops)
        self.wanted = True  # nobody listens any more where it is False
        self.pieces: asyncio.Queue[str | Answered] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def say(self, piece: str | Answered) -> None:
        """Hand something to the listener, from the thread of the model."""
        try:
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop has ended, and its listeners with it
            self.wanted = False


class Cut:
    """Text up to a stop text, without white space at its ends: holds back what may turn out to be either."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self._begun = False
        self.found = False

    def add(self, text: str) -> str:
        """What is sure to belong to the answer, now that this came."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = self._held[: min(places)]
            return self.rest()
        sure = len(self._held) - max((_begun(self._held, stop) for stop in self._stops), default=0)
        return self._taken(len(self._held[:sure].rstrip()))

    def rest(self) -> str:
        """What was held back and belongs to the answer, as nothing comes any more."""
        piece = self._taken(len(self._held.rstrip()))
        self._held = ""
        return piece

    def _taken(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        piece = piece if self._begun else piece.lstrip()
        self._begun = self._begun or bool(piece)
        return piece


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop text."""
    return next((count for count in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:count])), 0)


class Line:
    """The requests that wait, and the thread that answers them in order. `heard` is told of each answer."""

    def __init__(self, opened: Opened, heard: Callable[[Answered], None], most: int = MOST_WAITING) -> None:
        self._opened, self._heard, self._most = opened, heard, most
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        self._now: Job | None = None
        self._closed = False
        self._seconds = 1.0  # that the last answer took
        self._thread = Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def join(self, job: Job) -> None:
        """Put a request in line. Raises Refusal (429) where the line is full, and 503 where the server is ending."""
        with self._changed:
            if self._closed:
                raise Refusal(503, "the server is shutting down", kind="server_error", headers=[("retry-after", "10")])
            self._waiting = deque(one for one in self._waiting if one.wanted)
            if len(self._waiting) >= self._most:
                seconds = str(min(60, math.ceil(self._seconds)))
                problem = f"{self._most} requests are waiting already; try again later"
                raise Refusal(429, problem, kind="rate_limit_error", code="line_full", headers=[("retry-after", seconds)])
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End the answer at work and all that wait, at once; each is told so."""
        with self._changed:
            self._closed = True
            for job in filter(None, (self._now, *self._waiting)):
                job.wanted = False
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            done = self._answered(job) if job.wanted else Answered(job.model, len(job.prompt), 0, 0.0, "left")
            if done.tokens:
                self._seconds = time.monotonic() - began
            self._heard(done)
            job.say(done)
            release_memory()

    def _next(self) -> Job | None:
        with self._changed:
            self._now = None
            while not (self._waiting or self._closed):
                self._changed.wait()
            self._now = self._waiting.popleft() if self._waiting else None
            return self._now

    def _answered(self, job: Job) -> Answered:
        began = time.monotonic()
        try:
            tokens, reason = _speak(self._opened, job)
        except Exception:  # this request's fault or the machine's; the next one may be answered
            logging.getLogger(__name__).exception("an answer failed")
            tokens, reason = 0, "failed"
        return Answered(job.model, len(job.prompt), tokens, time.monotonic() - began, reason)


def _speak(opened: Opened, job: Job) -> tuple[int, str]:
    """Answer one request, piece by piece; the number of tokens that were made, and why it ended."""
    stops = stop_ids(opened.model, opened.chat)
    letters = Letters(opened.chat, set(stops))

    def hear(newest: list[int]) -> bool:
        piece = job.cut.add(letters.add(newest[0]))
        if piece:
            job.say(piece)
        return job.wanted and not job.cut.found

    with _side(opened, job.model), opened.objective.precision():
        [done] = continued(opened.model, opened.chat, [job.prompt], job.how, seed=job.seed, clock=Clock(hear), stops=stops)
    if not job.cut.found:
        piece = job.cut.add(letters.rest()) + job.cut.rest()
        if piece:
            job.say(piece)
    if not (job.wanted or done.stopped or job.cut.found):
        return done.tokens, "left"
    return done.tokens, "stop" if done.stopped or job.cut.found else "length"


def _side(opened: Opened, model: str) -> Any:
    """The base inside a tuned model while the block lasts, where that is asked."""
    return without_adapter(opened.model) if opened.is_adapter and model == BASE else nullcontext()
