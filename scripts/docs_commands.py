"""Writes docs/commands.md: every command with an example, what it printed, and its help.

    python scripts/docs_commands.py            # renew the help, keep what the examples printed
    python scripts/docs_commands.py --run      # run the examples too, on the model inside the package

A test fails where a command is missing or its help is not what the page shows.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from llm_finetune_kit.cli import COMMANDS, main
from llm_finetune_kit.cli_data import COMMANDS as DATA_COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
MOST_LINES = 24  # of what an example printed

INTRO = """\
# Commands

Every command of the terminal, with an example, what it printed on two cores that other programs used too, and its help.
`finetune COMMAND --help` shows the same. Commands that only look take `--json`; plans and results go to stdout, progress
and notes to stderr; colours are left out where `NO_COLOR` is set or nobody looks.

`finetune` alone trains: `finetune --model gpt2 --data train.jsonl` is `finetune train --model gpt2 --data train.jsonl`.
Completion for bash, zsh and fish: `eval "$(finetune completion bash)"`.
"""

# What is run for the page, in this order: the later ones look at what the earlier ones made.
SHOWN: dict[str, str] = {
    "demo": "finetune demo",
    "init": "finetune init mine.yaml --model demo --data sample:instruct",
    "train": "finetune train mine.yaml training.max_steps=4 --run-name short",
    "plan": 'finetune plan --model mistral-7b --on "RTX 4090"',
    "resume": "finetune resume short --max-steps 6",
    "tune": "finetune tune --model demo --data sample:chat --max-steps 4 --trials 3 training.learning_rate=3e-4..1e-2",
    "runs": "finetune runs",
    "report": "finetune report demo",
    "models": "finetune models --fits --on T4",
    "doctor": "finetune doctor",
    "generate": 'finetune generate outputs/demo --prompt "How do I reset my password?"',
    "eval": "finetune eval outputs/demo --data sample:chat",
    "compare": "finetune compare outputs/demo",
    "data check": "finetune data check sample:chat",
    "data preview": "finetune data preview sample:chat --model demo --count 1",
    "data convert": "finetune data convert sample:chat --to messages --out rows.jsonl",
    "data cache": "finetune data cache list",
    "explain": "finetune explain learning_rate",
    "chat": "printf '%s\\n' 'How do I reset my password?' /base 'How do I reset my password?' | finetune chat outputs/demo",
    "completion": "finetune completion fish",
}


def commands() -> list[str]:
    """Every command in the order of the overview; those of `data` in its place."""
    return [one for name in COMMANDS for one in ([f"data {inner}" for inner in DATA_COMMANDS] if name == "data" else [name])]


def help_of(command: str) -> str:
    """What `finetune COMMAND --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return said.getvalue().rstrip()


def page(printed: dict[str, str]) -> str:
    """The page, with what the examples printed."""
    parts = [INTRO]
    for command in commands():
        parts.append(f"## finetune {command}\n")
        if command in printed:
            parts.append(f"```console\n$ {SHOWN.get(command, f'finetune {command}')}\n{printed[command]}\n```\n")
        parts.append(f"```text\n{help_of(command)}\n```\n")
    return "\n".join(parts)


def kept(text: str) -> dict[str, str]:
    """What the examples of a page printed, by command."""
    found = re.findall(r"^## finetune (.+)\n\n```console\n\$ .*\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return {command: said.removesuffix("\n") for command, said in found}


def printed() -> dict[str, str]:
    """Run the examples in an empty folder; what each printed, long ones cut."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "bin" / "finetune"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m llm_finetune_kit "$@"\n')
        script.chmod(0o755)
        place = Path(folder) / "place"
        place.mkdir()
        here = os.environ | {
            "PATH": f"{script.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "LLM_FINETUNE_KIT_CACHE": str(Path(folder) / "cache"),
        }
        for command, line in SHOWN.items():
            done = subprocess.run(["bash", "-c", f"{line} 2>&1"], cwd=place, env=here, capture_output=True, text=True)
            found[command] = _short(done.stdout.replace(folder, "~").replace(str(Path.home()), "~"))
    return found


def _short(text: str) -> str:
    """Text of at most MOST_LINES lines: a long one keeps its beginning and its end."""
    lines = [line.rstrip() for line in text.strip("\n").split("\n")]
    half = MOST_LINES // 2
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[:half], "…", *lines[-half:]])


if __name__ == "__main__":
    before = kept(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    PAGE.write_text(page(before | printed() if "--run" in sys.argv else before), encoding="utf-8")
