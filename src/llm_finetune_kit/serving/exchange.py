"""One HTTP request on its way through the guard: its body counted and timed, its answer given headers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GRACE = 20.0  # seconds that may be spent waiting for a body
SLOWEST = 16_384  # bytes that earn a body one more second
LINGER = 2.0  # seconds for which the rest of a refused body is read: a connection that is cut loses the answer
GONE: Message = {"type": "http.disconnect"}
UNTOLD = {b"server", b"x-powered-by"}  # what an answer does not say


class Headers:
    """The headers of a request; names are in lower case."""

    def __init__(self, scope: Scope) -> None:
        self._pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        return [value for found, value in self._pairs if found == name]

    def first(self, name: str) -> str:
        """The first value of a header; empty if it is not there."""
        return next(iter(self.all(name)), "")


class Refusal(Exception):
    """An answer that the guard gives instead of the application, in the shape of OpenAI's errors."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = list(headers)
        self.body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class Exchange:
    """The `receive` and `send` of one request. `refused` says that the guard answered, and `gone` that the client left."""

    def __init__(self, headers: Headers, receive: Receive, send: Send, max_body: int, added: list[tuple[str, str]]) -> None:
        self._receive, self._send = receive, send
        self._headers, self._added = headers, added
        self.max_body = max_body
        self.started = self.refused = self.gone = False
        self._got = 0
        self._waited = 0.0
        self._whole = not (headers.first("transfer-encoding") or headers.first("content-length").strip("0"))

    def check_length(self) -> None:
        """Raise Refusal for a body that says itself that it is too large."""
        claimed = self._headers.first("content-length")
        if claimed.isdecimal() and int(claimed[:20]) > self.max_body:
            raise self._too_large()

    def check_complete(self) -> None:
        """Raise for an application that went away without an answer."""
        if not (self.started or self.refused or self.gone):
            raise RuntimeError("no answer was given")

    async def receive(self) -> Message:
        """The next message for the application. A body that is too large or too slow ends as if the client had left."""
        if self.refused:
            return GONE
        try:
            return await self._next()
        except Refusal as refusal:
            await self.refuse(refusal)
            return GONE

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises Refusal if it is larger than `limit`."""
        self.max_body = limit
        parts = []
        while not self._whole:
            message = await self._next()
            parts.append(message.get("body", b""))
            if message["type"] == "http.disconnect":
                break
        return b"".join(parts)

    async def _next(self) -> Message:
        if self._whole:
            return self._noted(await self._receive())
        began = time.monotonic()
        left = GRACE + self._got / SLOWEST - self._waited
        try:
            message = await asyncio.wait_for(self._receive(), max(0.01, left))
        except asyncio.TimeoutError:
            raise Refusal(408, "the body of the request comes too slowly") from None
        self._waited += time.monotonic() - began
        if self._noted(message)["type"] == "http.request" and self._got > self.max_body:
            raise self._too_large()
        return message

    def _noted(self, message: Message) -> Message:
        if message["type"] == "http.disconnect":
            self.gone = True
        else:
            self._got += len(message.get("body", b""))
        self._whole = self._whole or self.gone or not message.get("more_body", False)
        return message

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body of the request is larger than {self.max_body:,} bytes", code="request_too_large")

    async def send(self, message: Message) -> None:
        """Hand on what the application answers, unless the guard has answered already."""
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": self._with_ours(message.get("headers", []))}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer instead of the application, if it has not begun to."""
        if not (self.started or self.gone):
            await self.answer(refusal.status, refusal.body, [("content-type", "application/json"), *refusal.headers])
        self.refused = True

    async def answer(self, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
        """A whole answer. What is left of the request's body is read and thrown away, for a short time."""
        self.refused = self.started = True
        length = [] if status == 204 else [("content-length", str(len(body)))]
        closing = [] if self._whole else [("connection", "close")]
        pairs = _encoded([*headers, *length, *closing, *self._added])
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            await asyncio.wait_for(self._rest(), LINGER)
        except asyncio.TimeoutError:
            pass
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _rest(self) -> None:
        while not self._whole:
            self._noted(await self._receive())

    def _with_ours(self, given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """An application's headers with ours. Of what ours say, only a policy for its content may be said twice: both hold."""
        ours = _encoded(self._added)
        names = {name for name, _ in ours} - {b"content-security-policy", b"vary"} | UNTOLD
        pairs = [(name.lower(), value) for name, value in given]
        return [(name, value) for name, value in pairs if name not in names and not name.startswith(b"access-control-")] + ours


def _encoded(pairs: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in pairs]
