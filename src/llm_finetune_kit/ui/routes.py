"""What the server answers beside gradio's page: live state, stop and resume, downloads. All else is not there."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_finetune_kit.errors import KitError, UsageError
from llm_finetune_kit.files import MANIFEST
from llm_finetune_kit.ui import uploads
from llm_finetune_kit.ui.desk import Desk
from llm_finetune_kit.ui.uploads import PART

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox allow-popups"

# Of gradio's many routes, those that its page needs. It can also fetch addresses, serve files and record calls.
PAGE = ("/", "/theme.css", "/favicon.ico", "/config", "/config/")
PAGE_FOLDERS = ("/assets/", "/static/")
CALLS = ("queue/join", "queue/data", "upload", "upload_progress", "cancel", "reset", "startup-events", "app_id", "info")
OURS = ("/live", "/act", "/runs/")


def is_there(path: str) -> bool:
    """Whether the server has anything at that path."""
    plain = ".." not in path and "//" not in path and "\\" not in path
    call = path.removeprefix("/gradio_api/")
    asked = call != path and (call in CALLS or call.startswith("heartbeat/"))
    return plain and (asked or path in PAGE or path.startswith((*PAGE_FOLDERS, *OURS)))


class OnlyThese:
    """An application of which nothing but the paths of `is_there` can be reached, and no upload beyond the limits."""

    def __init__(self, app: Application, desk: Desk) -> None:
        self.app, self.desk = app, desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket" or not is_there(scope["path"]):
            return await Response("not found", 404, media_type="text/plain")(scope, receive, send)
        if scope["method"] == "POST" and not self._has_room(scope):
            return await Response("too large", 413, media_type="text/plain")(scope, receive, send)
        if scope["path"] == "/gradio_api/queue/join":
            body = await Request(scope, receive).body()
            if not self._names_uploads_alone(body):
                return await Response("not understood", 400, media_type="text/plain")(scope, receive, send)
            receive = _again(body, receive)
        await self.app(scope, receive, send)

    def _names_uploads_alone(self, body: bytes) -> bool:
        """Whether all files that a call names are uploads. gradio, mounted on another application, would take any file of
        the machine, and fetch any address, that a value of any control names in this way."""
        try:
            named = list(_files_in(json.loads(body)))
            return all(Path(str(one.get("path"))).resolve().is_relative_to(self.desk.workspace.incoming) for one in named)
        except (ValueError, RecursionError, OSError):
            return False

    def _has_room(self, scope: Scope) -> bool:
        """Whether what is sent is small, or an upload for which there is room."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        count = int(length) if length.isdigit() else self.desk.limits.file + PART  # as much as may come
        if scope["path"] != "/gradio_api/upload":
            return count <= PART
        held = uploads.used(self.desk.workspace)[0] + uploads.arriving(self.desk.workspace)
        return count <= self.desk.limits.file + PART and held + count <= self.desk.limits.total + PART


def _files_in(value: Any) -> Iterator[dict[str, Any]]:
    """All that gradio would take for a file in what a call carries."""
    if isinstance(value, dict) and {"path", "meta", "url"} & set(value):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _files_in(inner)


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, for the next one to read; then what else comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return receive_again


def routes(desk: Desk) -> list[Route]:
    """Our own routes, for Starlette."""

    async def live(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.live, request.query_params.get("run", "")[:200]))

    async def act(request: Request) -> Response:
        try:
            asked = await asyncio.wait_for(request.json(), 10)
            verb, name = str(asked["do"]), str(asked["run"])
        except (ValueError, KeyError, TypeError, TimeoutError):
            return JSONResponse({"error": "not understood"}, 400)
        try:
            await run_in_threadpool(desk.act, verb, name)
        except KitError as error:
            return JSONResponse({"error": f"{error.problem}. {error.fix}"}, 400)
        return JSONResponse({})

    async def report(request: Request) -> Response:
        name = request.path_params["name"]
        headers = {"Content-Security-Policy": REPORT_POLICY}
        if request.url.path.endswith(".html"):
            headers["Content-Disposition"] = f'attachment; filename="{uploads.slug(name) or "run"}-report.html"'
        text = (desk.workspace.run(name).path / "report.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=headers)

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        final = desk.workspace.run(name).final
        if not (final / MANIFEST).is_file():
            raise UsageError(50, "this run has no model yet", fix="wait for its end")
        headers = {"Content-Disposition": f'attachment; filename="{uploads.slug(name) or "run"}.zip"'}
        return StreamingResponse(_zipped(final), media_type="application/zip", headers=headers)

    return [
        Route("/live", live),
        Route("/act", act, methods=["POST"]),
        Route("/runs/{name}/report", _guarded(report)),
        Route("/runs/{name}/report.html", _guarded(report)),
        Route("/runs/{name}/model.zip", _guarded(model)),
    ]


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """What is not here is told in one line."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (KitError, OSError):
            return Response("not found", 404, media_type="text/plain")

    return answer


class _Pieces(io.RawIOBase):
    """A file that keeps what is written only until it is taken."""

    def __init__(self) -> None:
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, part: Any) -> int:
        self._held += part
        return len(part)

    def taken(self) -> bytes:
        held, self._held = bytes(self._held), bytearray()
        return held


def _zipped(folder: Path) -> Iterator[bytes]:
    """The files of a folder as a zip archive that needs no room on the disk."""
    pieces = _Pieces()
    with zipfile.ZipFile(pieces, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            about = zipfile.ZipInfo.from_file(path, path.relative_to(folder))
            with open(path, "rb") as source, archive.open(about, "w", force_zip64=True) as target:
                for part in iter(lambda: source.read(PART), b""):
                    target.write(part)
                    yield pieces.taken()
    yield pieces.taken()
