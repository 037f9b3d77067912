"""The page as a server: gradio mounted on an application of ours, behind the guard."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import KitError, MachineError
from llm_finetune_kit.serving.guard import Guard, Rules
from llm_finetune_kit.serving.listening import address_of
from llm_finetune_kit.ui.desk import Desk
from llm_finetune_kit.ui.uploads import PART, Limits
from llm_finetune_kit.ui.workspace import Workspace

PORT = 7860
ENDING = 2  # seconds that open connections have when the server is told to end
LIMITS = Limits()
COLOURS = {
    "body_background_fill": "#f6f6f3",
    "body_background_fill_dark": "#15181b",
    "block_background_fill": "#ffffff",
    "block_background_fill_dark": "#1e2226",
    "block_border_color": "#e0e1dc",
    "block_border_color_dark": "#343a41",
    "border_color_primary": "#e0e1dc",
    "border_color_primary_dark": "#343a41",
    "input_background_fill": "#f6f6f3",
    "input_background_fill_dark": "#282d33",
    "block_label_text_color": "#1f2328",
    "block_label_text_color_dark": "#e8eaec",
    "block_title_text_color": "#1f2328",
    "block_title_text_color_dark": "#e8eaec",
    "block_info_text_color": "#5d656f",
    "block_info_text_color_dark": "#a2abb5",
    "button_primary_background_fill": "#3f6fa8",
    "button_primary_background_fill_hover": "#345d8e",
    "button_primary_background_fill_dark": "#7fb0ea",
    "button_primary_background_fill_hover_dark": "#97c0f0",
    "button_primary_text_color_dark": "#10151a",
    "button_secondary_background_fill": "#ffffff",
    "button_secondary_background_fill_dark": "#1e2226",
    "button_secondary_border_color": "#c9cbc5",
    "button_secondary_border_color_dark": "#4a525b",
    "button_large_text_weight": "600",
    "button_border_width": "1px",
    "button_border_width_dark": "1px",
    "button_primary_border_color": "#3f6fa8",
    "button_primary_border_color_dark": "#7fb0ea",
    "color_accent": "#3f6fa8",
}
BEAT = 1.0  # seconds between looks at the queue


def require_gradio() -> None:
    """Raises MachineError with the command that installs it, where gradio is missing."""
    if find_spec("gradio") is None:
        raise MachineError(52, "the page in the browser needs gradio", fix="pip install 'llm-finetune-kit[ui]'")


def application(root: Path, rules: Rules, limits: Limits = LIMITS) -> Guard:
    """The whole page for one workspace, behind the guard, as an ASGI application. Raises MachineError without gradio."""
    require_gradio()
    workspace = Workspace(root.resolve())
    shutil.rmtree(workspace.incoming, ignore_errors=True)  # uploads that were cut off
    workspace.incoming.mkdir(parents=True, exist_ok=True)
    _calm(workspace.incoming)
    import gradio as gr
    from starlette.applications import Starlette

    from llm_finetune_kit.ui.page import Page
    from llm_finetune_kit.ui.routes import OnlyThese, routes

    desk = Desk(workspace, limits)
    app = Starlette(routes=routes(desk), lifespan=lambda app: _beating(desk))
    assets = files("llm_finetune_kit") / "assets" / "ui"
    gr.mount_gradio_app(
        app,
        Page(desk).build(),
        path="",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.file,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(gr),
        css=(assets / "ui.css").read_text(encoding="utf-8"),
        head=f"<script>{(assets / 'ui.js').read_text(encoding='utf-8')}</script>",
    )
    return Guard(OnlyThese(app, desk), rules)


def _calm(incoming: Path) -> None:
    """gradio reports nothing, asks no one for versions and keeps what is uploaded in the workspace."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_TEMP_DIR": str(incoming),
        "GRADIO_RUN_HISTORY": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _theme(gr: Any) -> Any:
    """Fonts that the system has, and the colours of our reports."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    base = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=mono, radius_size="lg", text_size="md")
    return base.set(**COLOURS)


@asynccontextmanager
async def _beating(desk: Desk) -> AsyncIterator[None]:
    """While the server lives, it looks after the queue."""

    async def beat() -> None:
        while True:
            with suppress(KitError, OSError):  # a full disk: the next beat tries again
                await asyncio.to_thread(desk.jobs.advance)
            await asyncio.sleep(BEAT)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


def rules_for(host: str, token: str | None, names: tuple[str, ...] = (), limits: Limits = LIMITS) -> Rules:
    """Whom the page answers. Raises UsageError for an address that others reach without a token."""
    return Rules(host=host, token=token, names=names, browser=True, max_body=limits.file + PART)


def serve(root: Path, rules: Rules, listener: socket.socket) -> None:
    """Serve the page on a bound socket until SIGINT or SIGTERM; the runs that it started go on."""
    app = application(root, rules)
    import uvicorn

    # What fails in a request is told by the guard; uvicorn's own words are of connections that ended with it.
    how: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False, "ws": "none"}
    how |= {"server_header": False, "proxy_headers": False, "timeout_graceful_shutdown": ENDING}
    server = uvicorn.Server(uvicorn.Config(app, **how))
    address = address_of(listener).replace("127.0.0.1", "localhost")
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn sends them again when it has ended, and then they mean nothing
        signal.signal(number, lambda *_: None)
    print(f"The page is at {address}; Ctrl+C ends it, and runs go on", flush=True)
    server.run(sockets=[listener])
    print("stopped")
