"""Asking an ASGI application without a network, and running one on a real port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from llm_finetune_kit.serving.listening import bound


@dataclass(frozen=True)
class Answer:
    """What came back: `status` is 403 for a websocket that was not accepted, as a server makes of it."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    app: Any,
    method: str = "GET",
    path: str = "/",
    headers: dict[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes | list[bytes] = b"",
    *,
    client: str = "127.0.0.1",
    kind: str = "http",
    query: str = "",
) -> Answer:
    """The answer to one request; `body` as a list comes in pieces, without a length."""
    pairs = list(headers.items() if isinstance(headers, dict) else headers)
    pieces = body if isinstance(body, list) else [body]
    if not any(name.lower() == "host" for name, _ in pairs):
        pairs.append(("host", "localhost:7860"))
    if isinstance(body, list):
        pairs.append(("transfer-encoding", "chunked"))
    elif body:
        pairs.append(("content-length", str(len(body))))
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    scope = {"type": kind, "method": method, "path": path, "headers": raw, "client": (client, 5), "scheme": "http"}
    scope |= {"query_string": query.encode(), "root_path": "", "http_version": "1.1", "server": ("localhost", 7860)}
    return asyncio.run(_asked(app, scope, pieces, kind))


async def _asked(app: Any, scope: dict[str, Any], pieces: list[bytes], kind: str) -> Answer:
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting[-1]["more_body"] = False
    said: list[Any] = []

    async def receive() -> Any:
        if kind == "websocket":
            return {"type": "websocket.connect"}
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        said.append(message)

    await app(scope, receive, send)
    if kind == "websocket":
        return Answer(101 if said[0]["type"] == "websocket.accept" else 403, {}, b"")
    heads = [message for message in said if message["type"] == "http.response.start"]
    assert len(heads) == 1, said
    found = {name.decode().lower(): value.decode("latin-1") for name, value in heads[0]["headers"]}
    policies = [value.decode() for name, value in heads[0]["headers"] if name == b"content-security-policy"]
    found["content-security-policy"] = " && ".join(policies)
    return Answer(heads[0]["status"], found, b"".join(message.get("body", b"") for message in said[1:]))


@contextmanager
def running(server: Callable[[], uvicorn.Server]) -> Iterator[int]:
    """The port of a server that works in a thread while the block lasts."""
    listener = bound("127.0.0.1", 0)
    made = server()
    thread = threading.Thread(target=lambda: asyncio.run(made.serve(sockets=[listener])), daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not made.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        made.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()
