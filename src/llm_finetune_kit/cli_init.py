"""`finetune init`: a config to begin with, every knob of it explained."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llm_finetune_kit.arguments import Parser
from llm_finetune_kit.errors import MachineError, UsageError
from llm_finetune_kit.files import write_whole
from llm_finetune_kit.starter import starter_config

TEXT = """\
write a config to begin with

It names a model and data; every other setting stands in it, switched off, with its default, its limits and its help. A
file that exists is left alone unless --overwrite says otherwise. `-` prints the config instead of writing it.
"""
EXAMPLES = (
    "finetune init",
    "finetune init mine.yaml --model gpt2 --data train.jsonl",
    "finetune init - --model tinyllama | less",
)


def init_command(words: list[str]) -> int:
    """`finetune init [FILE]`; returns the exit code."""
    parser = Parser(prog="finetune init", description=TEXT, examples=EXAMPLES)
    parser.add_argument("file", nargs="?", default="finetune.yaml", help="the file to write (default finetune.yaml; - prints it)")
    parser.add_argument("--model", "-m", default="demo", help="the model that learns (default demo, which is in the package)")
    parser.add_argument("--data", "-d", default="sample:chat", help="what it learns from (default sample:chat, in the package)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    asked = parser.parse_all(words)
    from llm_finetune_kit.models.locate import check_name

    check_name(asked.model)
    text = starter_config("finetune.yaml" if asked.file == "-" else asked.file, model=asked.model, data=asked.data)
    if asked.file == "-":
        print(text, end="")
        return 0
    _write(Path(asked.file), text, asked.overwrite)
    print(f"written: {asked.file}")
    print(f"look at the plan:  finetune plan {asked.file}\nstart it:          finetune train {asked.file}")
    return 0


def _write(path: Path, text: str, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise UsageError(
            32, "exists already, and is not overwritten", where=str(path), fix="name another file, or add --overwrite"
        )
    if path.suffix not in (".yaml", ".yml"):
        print(f"note: `finetune {path}` alone is taken for a config only with the ending .yaml", file=sys.stderr)
    try:
        write_whole(path, text)
    except OSError as error:
        fix = "name a file in a folder that exists and can be written"
        raise MachineError(80, f"cannot be written: {error.strerror}", where=str(path), fix=fix) from None
