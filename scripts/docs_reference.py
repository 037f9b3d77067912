"""Writes the pages of the documentation that are made from the program: settings, errors, Python names, floors.

    python scripts/docs_reference.py

A test fails where a page is not what this makes of the program.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import llm_finetune_kit
from llm_finetune_kit.arguments import FLAGS
from llm_finetune_kit.config import ALIASES, RunConfig, Section, knobs
from llm_finetune_kit.error_codes import error_codes
from llm_finetune_kit.left_open import LEFT_OPEN
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.settings import expected
from llm_finetune_kit.starter import about

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by scripts/docs_reference.py; change the program, not this page. -->\n\n"
WIDE = 80  # letters of a signature that still stand on one line
PACKAGE = "llm_finetune_kit"

# What the names of a module are for, in the order of the page; names of other modules come last.
CHAPTERS = {
    "trainers": "Train",
    "api": "Load, ask, reckon",
    "api_evaluate": "Measure and compare",
    "run": "Runs",
    "tuning.search": "",
    "config": "Settings",
    "settings": "",
    "plan": "",
    "classic": "Classes of the LLaMA framework",
    "classic_config": "",
    "errors": "Errors",
}
KINDS = {
    "USAGE": "The command line or a call",
    "CONFIG": "Settings",
    "DATA": "Data",
    "MODEL": "Models, adapters, checkpoints",
    "MACHINE": "Memory, disk, network, packages",
    "TRAIN": "Training",
    "BUSY": "Another process",
    "STOP": "Stopped by a signal, and saved",
    "BUG": "A fault of the program",
}


# --- settings ----------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every knob, by section: what it takes, its default, its flag and its help."""
    page = [
        MADE + "# Every setting\n",
        "In YAML under the name of its section, on the command line as `section.key=value` or by its flag, in Python by its name",
        "alone. In italics: what becomes of it when it is left open. `finetune explain KEY` tells more of each.\n",
    ]
    flags = {knob: flag for flag, knob in FLAGS.items()}
    for title, intro, paths in sections():
        page += [f"## {title}\n", f"{intro}\n", "| setting | what it does |", "|---|---|"]
        page += [_knob(path, flags.get(path)) for path in paths]
        page.append("")
    page += ["## Other spellings\n", "Names of other tools that are understood; the canonical one is told.\n"]
    page += ["| you write | it means |", "|---|---|"]
    page += [f"| {', '.join(f'`{name}`' for name in names)} | `{knob}` |" for knob, names in other_spellings().items()]
    return "\n".join(page) + "\n"


def sections(section: type[Section] = RunConfig, prefix: str = "") -> list[tuple[str, str, list[str]]]:
    """Title, docstring and the paths of the own knobs of each section, the root's first."""
    own = [prefix + name for name in section.model_fields if prefix + name in knobs()]
    found = [(prefix.rstrip(".") or "At the top", about(section), own)] if own else []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += sections(field.annotation, f"{prefix}{name}.")
    return found


def _knob(path: str, flag: str | None) -> str:
    field = knobs()[path]
    default = f"Default `{dump_yaml({'x': field.default}).strip().removeprefix('x: ')}`."
    if path in LEFT_OPEN:
        default = f"*Left open: {LEFT_OPEN[path].means}.*"
    name = f"`{path}`" + (f"<br>`{flag}`" if flag else "")
    return f"| {name} | {field.description}<br>Takes {expected(path)}. {default} |"


def other_spellings() -> dict[str, list[str]]:
    """The accepted spellings of each knob, without those that only repeat its name."""
    found: dict[str, list[str]] = {}
    for name, knob in ALIASES.items():
        if name != knob.rpartition(".")[2]:
            found.setdefault(knob, []).append(name)
    return dict(sorted(found.items()))


# --- errors ------------------------------------------------------------------------------------------------


def troubleshooting() -> str:
    """Every error code by its kind."""
    page = [
        MADE + "# Errors by code\n",
        "An error names its code, the place, the reason and the cure. `finetune explain CODE` shows what stands here.",
        "Something else is wrong? `finetune doctor` looks at the machine, `finetune data check` at the data, and a run's",
        "`debug.log` holds the rest.\n",
    ]
    kind = ""
    for code, one in error_codes().items():
        if code.partition("-")[0] != kind:
            kind = code.partition("-")[0]
            page += [
                f"## {KINDS[kind]}\n",
                f"Exit code {one.exit_code}.\n" if kind != "STOP" else "Exit code 128 and the signal's number.\n",
            ]
        page += [f"### {code}\n", f"{one.means}\n", f"**Why:** {one.cause}\n", f"**Fix:** {one.fix}\n"]
    return "\n".join(page).rstrip() + "\n"


# --- Python ------------------------------------------------------------------------------------------------


def python() -> str:
    """Every public name with its signature and docstring, by chapter."""
    page = [
        MADE + "# Python\n",
        f"All names below come from `{PACKAGE}` itself and load on first use: `from {PACKAGE} import QuickTrainer`.",
        "Settings are given by their name alone (`max_steps=100`), their path or a known spelling;",
        "[here they all are](configuration.md).\n",
    ]
    by_home: dict[str, list[str]] = {module: [] for module in CHAPTERS}
    for name in llm_finetune_kit.__all__:
        by_home.setdefault(llm_finetune_kit._HOME[name], []).append(name)
    for module, names in by_home.items():
        title = CHAPTERS.get(module, module.replace("_", " ").capitalize())
        page += [f"## {title}\n"] if title and names else []
        for name in names:
            page += documented(name)
    return "\n".join(page).rstrip() + "\n"


def documented(name: str) -> list[str]:
    """The lines of one public name: its signature, its docstring, and those of its public methods."""
    value = getattr(llm_finetune_kit, name)
    lines = [f"### {name}\n", *_code(name, value), *_prose(value)]
    if inspect.isclass(value):
        for method, function in inspect.getmembers(value):
            own = function.fget if isinstance(function, property) else function
            if not method.startswith("_") and isinstance(own, FunctionType) and own.__module__.startswith(PACKAGE):
                title = f"{name}.{method}"
                code = [f"`{title}`\n"] if isinstance(function, property) else _code(title, function, own=True)
                lines += [*code, *_prose(own)]
    return lines


def _code(name: str, value: Any, *, own: bool = False) -> list[str]:
    """A call with its parameters, on one line if it fits; `own` leaves out self."""
    signature = inspect.signature(value)
    words: list[str] = []
    kinds = inspect.Parameter
    for one in list(signature.parameters.values())[1 if own else 0 :]:
        if one.kind is kinds.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(one.kind, "")
        default = "" if one.default is kinds.empty else f" = {_default(one.default)}"
        words.append(f"{stars}{one.name}: {_kind(one.annotation)}{default}")
    result = "" if inspect.isclass(value) else f" -> {_kind(signature.return_annotation)}"
    text = f"{name}({', '.join(words)}){result}"
    if len(text) > WIDE and words:
        text = "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){result}"])
    return [f"```py\n{text}\n```\n"]


def _default(value: Any) -> str:
    """A default as a reader writes it: a section that leaves all open by its name alone."""
    if isinstance(value, Section):
        return f"{type(value).__name__}()"
    if isinstance(value, str):
        return json.dumps(value)
    return value.__name__ if isinstance(value, FunctionType) else repr(value)


def _kind(annotation: Any) -> str:
    """An annotation as a reader writes it, without modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(rf"\b({PACKAGE}|typing|collections\.abc|pathlib)\.(\w+\.)*(?=\w)", "", text)


def _prose(value: Any) -> list[str]:
    """A docstring, with its examples as code."""
    text = inspect.getdoc(value) or ""
    found, example = [], False
    for line in text.splitlines():
        begins, ends = line.startswith(">>>"), example and not line.strip()
        if begins and not example:
            found, example = [*found, "```pycon"], True
        if ends:
            found, example = [*found, "```"], False
        found.append(re.sub(r"\s+# doctest:.*", "", line))
    return ["\n".join([*found, "```"] if example else found) + "\n"]


# --- floors ------------------------------------------------------------------------------------------------

FLOORS = re.compile(r"(<!-- floors -->\n\n).*?(\n\n<!-- /floors -->)", re.DOTALL)


def architecture() -> str:
    """The page on architecture, with the table of CONTRIBUTING.md in its place."""
    table = re.search(r"^\| floor .*?(?=\n\nValues flow)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    if table is None or not FLOORS.search(page):
        raise SystemExit("CONTRIBUTING.md has no table of floors, or docs/architecture.md no place for it")
    return FLOORS.sub(lambda found: found[1] + table[0] + found[2], page)


PAGES = {
    "configuration.md": configuration,
    "troubleshooting.md": troubleshooting,
    "python.md": python,
    "architecture.md": architecture,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")
