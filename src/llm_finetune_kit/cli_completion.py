"""`finetune completion`: scripts for the shells, and the words that they ask for when TAB is pressed."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from llm_finetune_kit.arguments import FLAGS, Parser
from llm_finetune_kit.config import knobs
from llm_finetune_kit.errors import KitError

TEXT = """\
print a script that completes words in a shell

It completes commands, flags, settings, models and the names of runs. The script asks the program for them, so it never
needs to be made anew.
"""
EXAMPLES = (
    'eval "$(finetune completion bash)"       # for this shell',
    "finetune completion bash > ~/.local/share/bash-completion/completions/finetune",
    'eval "$(finetune completion zsh)"        # in ~/.zshrc, after compinit',
    "finetune completion fish > ~/.config/fish/completions/finetune.fish",
)

BASH = """\
_finetune() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\\n'
    local word=${line##*[[:space:]]}
    local before=${word%"${word##*[:=]}"}    # bash takes words apart at : and =
    COMPREPLY=($(finetune completion words "$line" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _finetune finetune
"""
ZSH = """\
#compdef finetune
_finetune() {
    local -a found
    found=("${(@f)$(finetune completion words "${LBUFFER}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then
        compadd -S '' -a found
    else
        _files
    fi
}
compdef _finetune finetune
"""
FISH = """\
complete -c finetune -a '(finetune completion words (commandline -cp) 2>/dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
MODELS_OF = ("generate", "eval", "compare", "chat", "export", "serve")  # commands that work on a model or a run
TAKES_KNOBS = ("train", "plan", "demo", "resume", "tune")


def completion_command(words: list[str]) -> int:
    """`finetune completion SHELL`, and `completion words LINE` for the scripts; returns the exit code."""
    if words[:1] == ["words"]:
        with contextlib.suppress(KitError, OSError):  # nobody can read an error in the middle of a line
            print("\n".join(suggestions(" ".join(words[1:]))))
        return 0
    parser = Parser(prog="finetune completion", description=TEXT, examples=EXAMPLES)
    parser.add_argument("shell", choices=list(SCRIPTS), help="the shell that is to complete")
    print(SCRIPTS[parser.parse_all(words).shell], end="")
    return 0


def suggestions(line: str) -> list[str]:
    """The words that the last word of a command line, which may be empty, could become."""
    parts = _parts(line)
    before, last = parts[1:-1], parts[-1] if len(parts) > 1 else ""
    return sorted({word for word in _words(before, last) if word.startswith(last)})


def _parts(line: str) -> list[str]:
    try:
        parts = shlex.split(line)
    except ValueError:  # a quote is still open
        parts = line.split()
    return [*parts, ""] if not line or line[-1].isspace() else parts


def _words(before: list[str], last: str) -> Iterable[str]:
    from llm_finetune_kit.cli import COMMANDS
    from llm_finetune_kit.cli_data import COMMANDS as DATA

    if not before:
        first = [*COMMANDS, "help", "--version"]
        return [*_flags(["train"]), *first] if last.startswith("-") else [*first, *(_knobs(last) if last else ())]
    if before[0] == "help":
        return COMMANDS
    command = [before[0]] if before[0] in COMMANDS else ["train"]
    if command == ["data"] and before[1:2] and before[1] in DATA:
        command = before[:2]
    elif command == ["data"]:
        return DATA
    flags = _flags(command)
    if flags.get(before[-1]) is not None:
        return _values(before[-1], flags[before[-1]] or "")
    return flags if last.startswith("-") else _positional(command[0], before, last)


def _flags(command: list[str]) -> dict[str, str | None]:
    """Every flag of a command, read off its help, with the name of what it takes (None: it takes nothing)."""
    from llm_finetune_kit.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    found: dict[str, str | None] = {}
    for line in re.findall(r"^  (-.+?)(?:   .*)?$", said.getvalue(), re.MULTILINE):
        takes = re.search(r"-[\w-]+ (\S+)", line)
        for flag in re.findall(r"(?<!\S)-[\w-]+", line):
            found[flag] = takes[1].rstrip(",") if takes else None
    return found


def _values(flag: str, takes: str) -> Iterable[str]:
    """What a flag may be given; nothing where any text or file may follow."""
    if takes.startswith("{"):
        return takes.strip("{}").split(",")
    if flag in ("--model", "-m"):
        return _models()
    if flag in ("--data", "-d", "--eval-data"):
        from llm_finetune_kit.data.sources.files import sample_names

        return ["alpaca", "daily_dialog", "both", *(f"sample:{name}" for name in sample_names()), *_files("", DATA_FILES)]
    if flag == "--on":
        from llm_finetune_kit.gpus import GPUS

        return [name.replace(" ", "") for name in GPUS]
    return _choices(FLAGS[flag]) if flag in FLAGS else ()


def _positional(command: str, before: list[str], last: str) -> Iterable[str]:
    if command in ("runs", "report", "resume"):
        actions = ["list", "show", "rm"] if command == "runs" and len(before) == 1 else []
        return [*actions, *([] if actions else _runs(before)), *(_knobs(last) if command == "resume" else ())]
    if command in TAKES_KNOBS:
        return [*_knobs(last), *_files(last, ("yaml", "yml"))]
    if command in MODELS_OF:
        found = [f"outputs/{name}" for name in _runs(before)]
        return [*_models(), *found, *(["outputs/final"] if found else [])]
    if command == "explain":
        from llm_finetune_kit.error_codes import error_codes

        return [*knobs(), *{knob.rpartition(".")[0] for knob in knobs()}, *error_codes(), "errors"]
    return SCRIPTS if command == "completion" else ()


def _knobs(last: str) -> list[str]:
    """Settings with their equals sign; behind it, the values that a setting may have."""
    knob, equals, _ = last.partition("=")
    return [f"{knob}={value}" for value in _choices(knob)] if equals else [f"{path}=" for path in knobs()]


def _choices(knob: str) -> list[str]:
    field = knobs().get(knob)
    kind = str(field.annotation) if field is not None else ""
    words = re.findall(r"'([^']+)'", kind)
    return ["true", "false"] if "bool" in kind else words


def _models() -> list[str]:
    from llm_finetune_kit.catalog import MODELS

    return list(MODELS)


def _runs(before: list[str]) -> list[str]:
    from llm_finetune_kit.runs import runs

    place = dict(pairwise(before)).get("--output-dir", "outputs")
    return [run.path.name for run in runs(Path(place))]


DATA_FILES = ("jsonl", "json", "csv", "tsv", "parquet", "txt")


def _files(last: str, endings: tuple[str, ...]) -> list[str]:
    folder = Path(last).parent if "/" in last else Path()
    return [str(path) for ending in endings for path in folder.glob(f"*.{ending}")] + [
        f"{path}/" for path in folder.glob("*/") if not path.name.startswith(".")
    ]
