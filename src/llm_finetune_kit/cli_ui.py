"""`finetune ui` and `finetune-demo`: the page in a browser. Holds no logic of its own."""

from __future__ import annotations

from pathlib import Path

from llm_finetune_kit.arguments import Parser

TEXT = """\
open the page in a browser: choose a model, check data, train, watch, compare and chat

It serves the folder where it is started: its runs are those of `finetune runs` there, and those started in a terminal
appear too. It is reached from this machine alone, unless --host and --token-file say otherwise. Ending it ends no run.
"""
EXAMPLES = (
    "finetune ui",
    "finetune ui --port 0",
    "finetune ui --host 0.0.0.0 --token-file token.txt",
)


def ui_command(words: list[str]) -> int:
    """`finetune ui [--host ADDRESS] [--port N] [--token-file FILE]`; returns the exit code."""
    from llm_finetune_kit.ui.server import PORT, require_gradio, rules_for, serve

    parser = Parser(prog="finetune ui", description=TEXT, examples=EXAMPLES, exits=(0, 2, 5, 7))
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of the page (default {PORT}; 0 takes any that is free)")
    parser.add_argument("--token-file", metavar="FILE", help="file with a token that visitors have to know")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name of this server")
    asked = parser.parse_all(words)
    require_gradio()
    from llm_finetune_kit.serving.access import read_token
    from llm_finetune_kit.serving.listening import bound

    token = None if asked.token_file is None else read_token(asked.token_file)
    rules = rules_for(asked.host, token, tuple(asked.allow_host))
    with bound(asked.host, asked.port) as listener:
        serve(Path.cwd(), rules, listener)
    return 0
