"""`finetune ui` and `finetune-demo`: the page in a browser. Holds no logic of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from llm_finetune_kit.arguments import Parser

ABOUT = """\
open the page in a browser: choose a model, check data, train, watch, compare and chat

It serves the folder where it is started: its runs are those of `finetune runs` there, and those started in a terminal
appear too. It is reached from this machine alone. Ending it never ends a run.
"""


def ui_command(words: list[str]) -> int:
    """`finetune ui [--port N]`; returns the exit code."""
    from argparse import RawDescriptionHelpFormatter

    from llm_finetune_kit.ui.server import PORT, require_gradio, serve

    parser = Parser(prog="finetune ui", description=ABOUT, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=PORT, help=f"port of the page (default {PORT})")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    asked = parser.parse_all(words)
    require_gradio()
    serve(Path.cwd(), host=asked.host, port=asked.port)
    return 0


def demo(words: list[str] | None = None) -> int:
    """The command `finetune-demo`."""
    from llm_finetune_kit.cli import guarded

    return guarded(lambda: ui_command(list(sys.argv[1:] if words is None else words)))
