"""`finetune serve`: a model behind an OpenAI-compatible chat API. Holds no logic of its own."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from llm_finetune_kit.arguments import Parser
from llm_finetune_kit.cli_evaluate import checked_model
from llm_finetune_kit.errors import UsageError

if TYPE_CHECKING:
    from llm_finetune_kit.serving.answering import Answered
    from llm_finetune_kit.serving.server import Heard, Listening

TEXT = """\
answer over HTTP, in the form of OpenAI's chat API

The model is a run, outputs/final, a folder, a known name or a hub id. A tuned adapter is served as `tuned`, and its base as
`base`. Only this machine can reach it; with a token, others may. docs/serving.md has clients and limits.
"""
EXAMPLES = (
    "finetune serve outputs/final",
    "finetune serve demo --port 0",
    "finetune serve outputs/final --host 0.0.0.0 --token-file token.txt",
    "finetune serve outputs/final --cors http://localhost:3000",
)


def serve_command(words: Sequence[str]) -> int:
    """`finetune serve MODEL`; returns the exit code once it was told to end."""
    parser = Parser(prog="finetune serve", description=TEXT, examples=EXAMPLES, exits=(0, 2, 4, 5, 7))
    parser.add_argument("model", nargs="?", help="what to serve, for example outputs/final")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000; 0 takes any that is free)")
    parser.add_argument("--token-file", metavar="FILE", help="file with a token that every request has to bring")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name of this server")
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="a site whose scripts may call it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="number format (default: by machine)")
    asked = parser.parse_all(list(words))
    if asked.model is None:
        raise UsageError(2, "no model is named", fix="for example: finetune serve outputs/final")
    from llm_finetune_kit.serving.access import read_token
    from llm_finetune_kit.serving.guard import Rules

    token = None if asked.token_file is None else read_token(asked.token_file)
    rules = Rules(host=asked.host, token=token, names=tuple(asked.allow_host), origins=tuple(asked.cors))
    checked_model(asked.model)
    from llm_finetune_kit.serving.listening import bound, check_installed

    check_installed()
    with bound(asked.host, asked.port) as listener:
        from llm_finetune_kit.serving.server import serve

        serve(asked.model, rules, listener, dtype=asked.dtype, heard=_told(asked.token_file))
    print("stopped")
    return 0


def _told(token_file: str | None) -> Heard:
    """A listener that prints what the server says."""

    def hear(said: Listening | Answered) -> None:
        from llm_finetune_kit.serving.server import Listening

        with suppress(OSError):  # a terminal that was closed is no reason to stop answering
            print(_listening(said, token_file) if isinstance(said, Listening) else _answered(said), flush=True)

    return hear


def _listening(said: Listening, token_file: str | None) -> str:
    lines = [f"curl {said.address}/v1/chat/completions", '-H "Content-Type: application/json"']
    lines += [f'-H "Authorization: Bearer $(cat {shlex.quote(token_file)})"'] if token_file else []
    lines += [f'''-d '{{"model": "{said.models[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'''']
    source = "" if said.folder in said.models else f" ({said.folder})"
    command = " \\\n    ".join(lines)
    return f"""\
{" and ".join(said.models)}{source}: ready on {said.device} in {said.dtype}
listening on {said.address}/v1; Ctrl+C ends it. Try it:

  {command}
"""


def _answered(said: Answered) -> str:
    """One line for an answer; what was asked and said is in no log."""
    counts = f"{said.prompt_tokens:,} + {said.tokens:,} tokens"
    return f"{time.strftime('%H:%M:%S')}  {said.model}  {counts}  {said.seconds:.1f} s  {said.reason}"
