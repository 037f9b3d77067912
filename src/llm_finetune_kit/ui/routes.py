"""What the server answers beside gradio's page: live state, stop and resume, downloads. All else is not there."""

from __future__ import annotations

import asyncio
import tempfile
import zipfile
from collections.abc import Awaitable, Callable, MutableMapping
from typing import IO, Any

from starlette.background import BackgroundTask
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
        await self.app(scope, receive, send)

    def _has_room(self, scope: Scope) -> bool:
        """Whether what is sent is small, or an upload for which there is room."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        count = int(length) if length.isdigit() else self.desk.limits.file + PART  # as much as may come
        if scope["path"] != "/gradio_api/upload":
            return count <= PART
        held = uploads.used(self.desk.workspace)[0] + uploads.arriving(self.desk.workspace)
        return count <= self.desk.limits.file + PART and held + count <= self.desk.limits.total + PART


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
        packed = await run_in_threadpool(_zipped, final)
        headers = {"Content-Disposition": f'attachment; filename="{uploads.slug(name) or "run"}.zip"'}
        done = BackgroundTask(packed.close)
        return StreamingResponse(_parts(packed), media_type="application/zip", headers=headers, background=done)

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


def _zipped(folder: Any) -> IO[bytes]:
    """The files of a folder, packed into a file without a name: it is gone when it is closed."""
    packed = tempfile.TemporaryFile()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                archive.write(path, path.relative_to(folder))
    packed.seek(0)
    return packed


def _parts(file: IO[bytes]) -> Any:
    return iter(lambda: file.read(PART), b"")
