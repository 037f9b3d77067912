"""The config that `finetune init` writes: what must be said is set, and every other knob stands there, off, with its help."""

from __future__ import annotations

import textwrap
from typing import Any

from llm_finetune_kit.config import RunConfig, Section
from llm_finetune_kit.left_open import LEFT_OPEN
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.settings import expected

WIDTH = 96
HEAD = """\
# What to train, and how. Look at the plan first, then start it:
#
#     finetune plan {name}
#     finetune train {name}
#
# Two lines are set: the model and the data. Every other setting is here with its default and switched off by the #
# right in front of its name; take that # away to set it. What is left open the plan decides, and says why.
# More about a setting: finetune explain training.learning_rate
"""


def starter_config(name: str, *, model: str, data: str) -> str:
    """The text of a config that trains `model` on `data`; `name` is that of its file. It loads and runs as it stands."""
    values = {"model.name": model, "data.train_file": data}
    return "\n".join([HEAD.format(name=name), *_section(RunConfig, "", values)]).rstrip() + "\n"


def _section(section: type[Section], prefix: str, values: dict[str, Any]) -> list[str]:
    """The lines of a section's knobs and, after them, of the sections in it."""
    indent = "  " * prefix.count(".")
    lines = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            inner = _section(kind, f"{prefix}{name}.", values)
            lines += [*_comment(about(kind), indent), f"{indent}{name}:", *inner]
        else:
            lines += _knob(f"{prefix}{name}", field, indent, values)
    return lines


def about(section: type[Section]) -> str:
    """What a section is for, in a sentence or two."""
    return " ".join(str(section.__doc__).partition("\n\n")[0].split())


def _knob(path: str, field: Any, indent: str, values: dict[str, Any]) -> list[str]:
    """Help and limits of a knob above its line; the line is a comment where the knob is left at its default."""
    is_set = path in values
    line = dump_yaml({path.rpartition(".")[2]: values[path] if is_set else field.default}).strip()
    open_to = f" Left open: {LEFT_OPEN[path].means}." if path in LEFT_OPEN and not is_set else ""
    words = f"{field.description} Takes {expected(path)}.{open_to}"
    return [*_comment(words, indent), f"{indent}{'' if is_set else '#'}{line}", ""]


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False)
