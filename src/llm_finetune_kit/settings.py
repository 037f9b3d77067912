"""YAML and overrides in, RunConfig out. Defaults < file < overrides; all faults of a file are told at once.

YAML is read by the rules people expect: `1e-5` is a number, `no` is text, duplicate keys are errors,
tags and aliases that could run code or blow up memory are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llm_finetune_kit.config import ALIASES, RunConfig, knobs
from llm_finetune_kit.errors import ConfigError, nearest

MOST_BYTES = 1_000_000  # a config file larger than this is a mistake or an attack


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, no duplicate keys, no aliases; remembers the line of every key."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.lines: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(
                9, "YAML aliases (*name) are not accepted", where=f"line {mark.line + 1}", fix="write the value out"
            )
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.yaml_implicit_resolvers.setdefault("", []).append(("tag:yaml.org,2002:null", re.compile("^$")))


def _plain_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # YAML 1.1 would read 010 as octal 8


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    first_seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            key = str(key_node.value)
        if key in tree:
            raise ConfigError(
                7, f"the key {key} stands twice", where=f"lines {first_seen[key]} and {line}", fix="keep one of them"
            )
        first_seen[key] = line
        tree[key] = _Lined(loader.construct_object(value_node, deep=True), line)
    return tree


class _Lined:
    """A value and the line its key stands on."""

    def __init__(self, value: Any, line: int) -> None:
        self.value, self.line = value, line


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _plain_int)


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree that a YAML text holds, and the line of each key by its dotted path."""
    try:
        loader = _Loader(text.lstrip("\ufeff"))
        tree = loader.get_single_data()
    except ConfigError as error:
        error.where = f"{where} {error.where}".strip()
        raise
    except RecursionError:
        raise ConfigError(9, "nested too deep", where=where, fix="a config has two levels: sections and knobs") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where} line {mark.line + 1}, column {mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(8, f"not valid YAML: {problem}", where=place, fix=_yaml_hint(text, problem)) from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(
            8, f"holds a {type(tree).__name__} where sections are due", where=where, fix="start with `model:` and `data:`"
        )
    lines: dict[str, int] = {}
    return _unwrap(tree, "", lines), lines


def _yaml_hint(text: str, problem: str) -> str:
    if "\t" in text:
        return "indent with spaces, not tabs"
    if "quote" in problem or "scalar" in problem:
        return "close the quotes"
    return "check the indentation and the colon after each key"


def _unwrap(tree: Any, prefix: str, lines: dict[str, int]) -> Any:
    if isinstance(tree, _Lined):
        lines[prefix] = tree.line
        return _unwrap(tree.value, prefix, lines)
    if isinstance(tree, dict):
        return {key: _unwrap(value, f"{prefix}.{key}" if prefix else key, lines) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unwrap(value, prefix, {}) for value in tree]
    return tree


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: dict[str, Any] | None = None,
) -> tuple[RunConfig, list[str]]:
    """The config that a file, `section.key=value` overrides and ready values add up to, and notes for the user.

    Raises ConfigError with every fault found, each with its line.
    """
    tree: dict[str, Any] = {}
    lines: dict[str, int] = {}
    where = str(path) if path else ""
    if path is not None:
        tree, lines = read_yaml(_read_text(Path(path)), where)
    notes = _rename_aliases(tree, lines)
    for name, value in (values or {}).items():
        _plant(tree, name, value)
    for override in overrides:
        notes += _override(tree, override)
    return build(tree, where=where, lines=lines), notes


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(1, "is a folder, not a config file", where=str(path), fix="name a .yaml file in it")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(1, f"is larger than {MOST_BYTES:,} bytes", where=str(path), fix="name a YAML config file")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = nearest(path.name, [other.name for other in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else []
        fix = f"did you mean {path.parent / near[0]}?" if near else "write one with `finetune init`, or check the path"
        raise ConfigError(1, "no such config file", where=str(path), fix=fix) from None
    except OSError as error:
        raise ConfigError(1, f"cannot be read: {error.strerror}", where=str(path), fix="check the path and its rights") from None
    except UnicodeDecodeError as error:
        raise ConfigError(1, f"is not UTF-8 text (byte {error.start})", where=str(path), fix="save it as UTF-8") from None


def _rename_aliases(tree: dict[str, Any], lines: dict[str, int]) -> list[str]:
    """Move spellings of other tools to the knobs they mean; the section of a knob may itself be an alias' home."""
    notes = []
    places = [(key, key) for key in tree] + [
        (f"{section}.{key}", section) for section, branch in tree.items() if isinstance(branch, dict) for key in branch
    ]
    for path, _ in places:
        canonical = ALIASES.get(path)
        if canonical is None:
            continue
        section, _, key = path.rpartition(".")
        value = tree[section].pop(key) if section else tree.pop(key)
        _plant(tree, canonical, value, keep=True)
        if path in lines:
            lines.setdefault(canonical, lines[path])
        notes.append(f"{path} is called {canonical} here")
    return notes


def _plant(tree: dict[str, Any], path: str, value: Any, *, keep: bool = False) -> None:
    *sections, name = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return  # the fault is told when the tree is built
    if keep:
        tree.setdefault(name, value)
    else:
        tree[name] = value


def _override(tree: dict[str, Any], text: str) -> list[str]:
    key, equals, raw = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals:
        raise ConfigError(6, f"`{text}` is not of the form section.key=value", fix="for example training.max_steps=100")
    value, _ = (read_yaml(f"v: {raw}", where=text)[0]["v"], None) if raw else (None, None)
    canonical = ALIASES.get(key, key)
    _plant(tree, canonical, value)
    return [f"{key} is called {canonical} here"] if canonical != key else []


def build(tree: dict[str, Any], *, where: str = "", lines: dict[str, int] | None = None) -> RunConfig:
    """A RunConfig from a tree of plain values; ConfigError lists everything that is wrong with it."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(detail, where, lines or {}) for detail in _distinct(error)]
    first, *others = faults
    if others:
        more = "; ".join(str(other).partition("] ")[2].replace("\n  fix:  ", ", ") for other in others)
        first.why = f"{len(others)} more: {more}"
    raise first


def _distinct(error: ValidationError) -> list[Any]:
    """One fault per knob: pydantic reports each branch of a union."""
    seen: dict[str, Any] = {}
    for detail in error.errors(include_url=False):
        path = _knob_path(detail["loc"])
        seen.setdefault(path, detail)
    return list(seen.values())


def _knob_path(loc: tuple[Any, ...]) -> str:
    known = knobs()
    path = ".".join(str(part) for part in loc)
    while path not in known and "." in path and any(path.startswith(f"{name}.") for name in known):
        path = path.rpartition(".")[0]
    return path


def _fault(detail: Any, where: str, lines: dict[str, int]) -> ConfigError:
    path = _knob_path(detail["loc"])
    line = lines.get(path)
    place = ", ".join(part for part in (where, f"line {line}" if line else "") if part)
    if detail["type"] == "extra_forbidden":
        return ConfigError(2, f"unknown setting {path}", where=place, fix=_did_you_mean(path))
    field = knobs().get(path)
    if field is None:
        return ConfigError(3, f"{path} is {detail['input']!r}, expected a section with settings", where=place)
    number = 3 if detail["type"].endswith(("_type", "_parsing", "literal_error", "_from_float")) else 4
    return ConfigError(
        number, f"{path} is {_short(detail['input'])}: {detail['msg'].lower()}", where=place, fix=f"{path}: {field.description}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _did_you_mean(path: str) -> str:
    known = list(knobs())
    name = path.rpartition(".")[2]
    same_section = [other for other in known if other.rpartition(".")[0] == path.rpartition(".")[0]]
    by_name = {other.rpartition(".")[2]: other for other in known}
    near = nearest(path, known) or [by_name[word] for word in nearest(name, set(by_name))]
    if near:
        return f"did you mean {near[0]}?"
    return f"known here: {', '.join(sorted(same_section or known))}"


def dump_yaml(tree: dict[str, Any]) -> str:
    """Plain YAML that `read_yaml` reads back to the same values."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=False)
