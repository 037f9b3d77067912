"""The chat API in OpenAI's form: models, chat completions whole and in pieces, and health. Stands behind the guard."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_finetune_kit.errors import KitError
from llm_finetune_kit.opening import Opened
from llm_finetune_kit.runs import find_result
from llm_finetune_kit.serving.answering import BASE, Answered, Job, Line
from llm_finetune_kit.serving.asked import USUAL_TOKENS, Asked, read_request
from llm_finetune_kit.serving.exchange import Refusal

TUNED = "tuned"
LONGEST_TOKEN = 256  # characters: no tokenizer in use has a longer one, so longer texts need not be tokenized to be refused


def model_ids(opened: Opened) -> list[str]:
    """What a model is called in requests: `tuned` and `base` for an adapter, else its name without a path."""
    if opened.is_adapter:
        return [TUNED, BASE]
    folder = find_result(opened.name)
    if not folder.is_dir():
        return [opened.name]
    own = folder.resolve()
    return [own.parent.name if own.name == "final" or own.name.startswith("checkpoint-") else own.name]


class ChatAPI:
    """The routes for one open model; `line` answers."""

    def __init__(self, opened: Opened, line: Line) -> None:
        self._opened, self._line = opened, line
        self.ids = model_ids(opened)
        self._began = int(time.time())
        self._context = int(getattr(opened.model.config, "max_position_embeddings", 2048))
        self._reader = ThreadPoolExecutor(1, "tokens")  # long prompts are tokenized beside the loop, one after the other

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{model}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/health", self.health),
        ]
        return Starlette(routes=routes, exception_handlers={Refusal: _refused, HTTPException: _no_route})

    async def health(self, request: Request) -> Response:
        """That the server is there."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The models that can be asked."""
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.ids]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return JSONResponse(self._described(self._known(request.path_params["model"])))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "llm-finetune-kit"}

    def _known(self, name: str) -> str:
        if name not in self.ids:
            problem = f"there is no model {name[:80]} here; there is {' and '.join(self.ids)}"
            raise Refusal(404, problem, param="model", code="model_not_found")
        return name

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        loop = asyncio.get_running_loop()
        body = await request.body()
        asked = await loop.run_in_executor(self._reader, read_request, body)
        self._known(asked.model)
        prompt, most = await loop.run_in_executor(self._reader, self._prompt, asked)
        how = asked.how.model_copy(update={"max_new_tokens": most})
        job = Job(asked.model, prompt, how, seed=asked.seed, stops=asked.stops)
        self._line.join(job)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            events = _events(job, head, include_usage=asked.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        return await _whole(job, head, request)

    def _prompt(self, asked: Asked) -> tuple[list[int], int]:
        """The ids of the conversation, and how many may follow. Raises Refusal for one that does not fit."""
        if asked.most_tokens is not None and asked.most_tokens >= self._context:
            problem = f"max_tokens is {asked.most_tokens:,}, and this model's context is {self._context:,} tokens"
            raise Refusal(400, problem, param="max_tokens", code="invalid_value")
        if sum(len(message["content"]) for message in asked.messages) > LONGEST_TOKEN * self._context:
            raise self._too_long(f"more than {self._context:,}")
        try:
            prompt = self._opened.chat.prompt_ids(list(asked.messages))
        except KitError as error:  # the template refuses the conversation
            raise Refusal(400, error.problem, param="messages", code="invalid_value") from None
        room = self._context - len(prompt)
        if room < 1:
            raise self._too_long(f"{len(prompt):,}")
        return prompt, min(room, USUAL_TOKENS if asked.most_tokens is None else asked.most_tokens)

    def _too_long(self, count: str) -> Refusal:
        problem = f"the messages come to {count} tokens, and this model's context is {self._context:,} tokens"
        return Refusal(400, problem, param="messages", code="context_length_exceeded")


async def _whole(job: Job, head: dict[str, Any], request: Request) -> Response:
    """The answer in one piece. Raises Refusal where it failed."""
    gone = asyncio.ensure_future(_gone(request))
    said: list[str] = []
    try:
        while True:
            piece = asyncio.ensure_future(job.pieces.get())
            await asyncio.wait([piece, gone], return_when=asyncio.FIRST_COMPLETED)
            if not piece.done():
                piece.cancel()
                return Response()  # which nobody reads
            found = piece.result()
            if isinstance(found, Answered):
                break
            said.append(found)
    finally:
        job.wanted = False
        gone.cancel()
    if found.reason in ("failed", "left"):
        raise _without_answer(found.reason)
    message = {"role": "assistant", "content": "".join(said), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": found.reason}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(found)})


def _without_answer(reason: str) -> Refusal:
    if reason == "failed":
        return Refusal(500, "the answer failed; the server's log says why", kind="server_error")
    return Refusal(503, "the server is shutting down", kind="server_error")


async def _gone(request: Request) -> None:
    """Comes back when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(job: Job, head: dict[str, Any], *, include_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events. Whoever leaves ends the generation."""
    head = {**head, "object": "chat.completion.chunk"}
    usage = {"usage": None} if include_usage else {}

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**head, "choices": [choice], **usage})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while not isinstance(found := await job.pieces.get(), Answered):
            yield chunk({"content": found})
        if found.reason in ("failed", "left"):
            yield f"data: {_without_answer(found.reason).body.decode()}\n\n"
            return
        yield chunk({}, found.reason)
        if include_usage:
            yield _event({**head, "choices": [], "usage": _usage(found)})
        yield "data: [DONE]\n\n"
    finally:
        job.wanted = False


def _event(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"


def _usage(done: Answered) -> dict[str, int]:
    """Tokens of the rendered conversation, and all that were made for the answer, its end token among them."""
    counts = {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.tokens}
    return {**counts, "total_tokens": done.prompt_tokens + done.tokens}


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    headers = {"content-type": "application/json", **dict(refusal.headers)}
    return Response(refusal.body, refusal.status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = "there is no such route" if error.status_code == 404 else "this route does not take that method"
    refusal = Refusal(error.status_code, problem, headers=list((error.headers or {}).items()))
    return await _refused(request, refusal)
