"""From the knobs to controls and back. A new knob of the config appears in the browser without a line here.

What a form holds is turned into the words that a terminal would be given (`training.max_steps=100`), and those go
through the same reader: a form, a YAML file and a command line that say the same give the same config.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from llm_finetune_kit.config import RunConfig, knobs
from llm_finetune_kit.errors import ConfigError, KitError
from llm_finetune_kit.settings import COMMAND_LINE, load_config

Kind = Literal["switch", "choice", "choices", "lines", "text"]

WITHHELD = {
    "model.trust_remote_code": "it runs code that came with a model; a terminal is the place to allow that",
    "model.cache_dir": "it names a folder anywhere on the machine",
    "output.output_dir": "the page shows the runs of one folder",
}
OF_THE_TABS = ("model.name", "data.train_file", "data.eval_file")  # chosen in Model and Dataset
COMMON = (
    "training.max_steps",
    "training.num_epochs",
    "training.learning_rate",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "model.max_length",
    "method",
    "lora.r",
    "model.quantization",
    "training.eval_steps",
    "training.save_steps",
    "output.run_name",
)
OPEN = "decided for you"
COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?")  # a number as many countries write it


@dataclass(frozen=True)
class Control:
    """How one knob looks in a form: `value` is what it shows when nothing was said."""

    path: str
    kind: Kind
    label: str
    help: str
    value: Any
    choices: tuple[tuple[str, str], ...] = ()
    placeholder: str = ""
    long: bool = False  # a text of several lines may be meant


def controls() -> dict[str, Control]:
    """A control for every knob that the browser may set, by the knob's path."""
    return {path: _control(path, field) for path, field in knobs().items() if path not in WITHHELD}


def sections(shown: Mapping[str, Control]) -> dict[str, list[Control]]:
    """The controls that are not common, by section: `lora`, `training`, `evaluation.generation`…"""
    found: dict[str, list[Control]] = {}
    for path, control in shown.items():
        if path not in COMMON and path not in OF_THE_TABS:
            found.setdefault(path.rpartition(".")[0], []).append(control)
    return found


def _control(path: str, field: Any) -> Control:
    kinds = _kinds(field.annotation)
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
    lists = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
    look = {"path": path, "label": _label(path), "help": field.description}
    if bool in kinds and field.default is not None:
        return Control(**look, kind="switch", value=field.default)
    if bool in kinds:
        return Control(**look, kind="choice", value="", choices=((OPEN, ""), ("yes", "true"), ("no", "false")))
    if any(get_origin(one) is Literal for one in lists):
        words = next(get_args(one) for one in lists if get_origin(one) is Literal)
        return Control(**look, kind="choices", value=[], choices=tuple((word, word) for word in words))
    if literals and len(kinds) == 1:
        none = ((OPEN, ""),) if field.default is None else ()
        return Control(
            **look, kind="choice", value=field.default or "", choices=(*none, *((w, w) for w in get_args(literals[0])))
        )
    if lists == [str] and len(kinds) == 1:
        return Control(**look, kind="lines", value="", placeholder="one to a line")
    return Control(**look, kind="text", value="", placeholder=_placeholder(field.default, kinds), long=str in kinds)


def _label(path: str) -> str:
    """`training.max_steps` as `Max steps`, `lora.r` as `LoRA r`."""
    section, _, name = path.rpartition(".")
    text = name.replace("_", " ")
    return f"{section.replace('lora', 'LoRA')} {text}" if len(name) == 1 else text[0].upper() + text[1:]


def _placeholder(default: Any, kinds: tuple[Any, ...]) -> str:
    if default is None:
        return "none" if any(get_origin(kind) is dict for kind in kinds) else OPEN
    return f"{default:g}" if isinstance(default, float) else str(default)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not type(None))
    return (annotation,)


def words(values: Mapping[str, Any]) -> list[str]:
    """What a form says, as a terminal is told it: only what was filled in and is not the default."""
    known = controls()
    unknown = [path for path in values if path not in known]
    if unknown:
        raise KeyError(unknown[0])
    said = ((path, _word(known[path], value)) for path, value in values.items())
    return [f"{path}={word}" for path, word in said if word is not None]


def _word(control: Control, value: Any) -> str | None:
    if value is None or value == control.value:
        return None
    if control.kind == "switch":
        return "true" if value else "false"
    if control.kind == "choices":
        single = any(get_origin(kind) is Literal for kind in _kinds(knobs()[control.path].annotation))
        return str(value[0]) if single and len(value) == 1 else json.dumps(list(value))
    if control.kind == "lines":
        lines = [line for line in str(value).split("\n") if line.strip()]
        return json.dumps(lines, ensure_ascii=False) if lines else None
    text = str(value).rstrip("\n")
    if not text.strip():
        return None
    if str in _kinds(knobs()[control.path].annotation):  # a terminal takes these for something else than the text
        return json.dumps(text, ensure_ascii=False) if text[0] in "'\"" or text.strip() in ("null", "~") else text
    return text.strip()


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """The config that a form asks for. Raises ConfigError with every fault found, and KeyError for a withheld knob."""
    try:
        return load_config(None, words(values))[0]
    except ConfigError as error:  # nobody here wrote a command line
        error.where = error.where.removeprefix(COMMAND_LINE)
        error.problem = _labelled(error.problem)
        error.why = "\n".join(_labelled(line.strip().removeprefix(f"{COMMAND_LINE}: ")) for line in error.why.split("\n"))
        if any(COMMA.fullmatch(str(values.get(path, "")).strip()) for path in faulty(error)):
            error.fix = f"{error.fix.rstrip('.')}; numbers take a decimal point: 0.003, not 0,003"
        raise


def _labelled(line: str) -> str:
    """`training.max_steps is …` as `Max steps (training.max_steps) is …`: the form shows labels."""
    path, _, said = line.partition(" is ")
    control = controls().get(path)
    return line if control is None else f"{control.label} ({path}) is {said}"


def faulty(error: KitError) -> list[str]:
    """The knobs whose values `config_of` refused, by their paths."""
    found = re.findall(r"^[^(\n]* \(([a-z_.]+)\) is ", f"{error.problem}\n{error.why}", re.MULTILINE)
    return [path for path in found if path in controls()]


def values_of(config: RunConfig) -> dict[str, Any]:
    """What a form shows for a config: `config_of` gives it back."""
    tree = config.model_dump()
    return {path: _shown(control, _at(tree, path)) for path, control in controls().items()}


def _at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return tree


def _shown(control: Control, value: Any) -> Any:
    if value is None or value == knobs()[control.path].default:
        return control.value
    if control.kind == "switch":
        return value
    if control.kind == "choices":
        return list(value) if isinstance(value, (list, tuple)) else [value]
    if control.kind == "lines":
        return "\n".join(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
