"""YAML by the rules people expect, and the line of every key.

`1e-5` is a number, `012` is twelve, `no` is text, a key that stands twice is an error. Tags, which could run code,
and aliases, which could blow up memory, are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from llm_finetune_kit.errors import ConfigError

PREFIX = "tag:yaml.org,2002:"
SCALARS = {  # YAML 1.2's core schema, without octal and hexadecimal
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}

# What PyYAML says, and what its reader should do about it; the first match wins.
HINTS = (
    ("'\\t'", "indent with spaces, not with tabs"),
    ("quoted scalar", "close the quotes"),
    ("but got '?'", "put a text that holds ? into quotes"),
    ("flow", "close the bracket, and put a comma between its parts"),
    ("mapping values are not allowed", "check the indentation; a text that holds `: ` goes into quotes"),
    ("another document", "remove the line `---`: one file holds one config"),
    ("special characters", "remove it, or save the file as UTF-8 text"),
)


class _Lined:
    """A value and the line its key stands on."""

    def __init__(self, value: Any, line: int) -> None:
        self.value, self.line = value, line


class _Loader(yaml.SafeLoader):
    """Builds plain values only."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise ConfigError(9, "YAML aliases (*name) are not accepted", where=f"line {line}", fix="write the value out")
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(8, "a key must be a word", where=f"line {line}", fix="write `key: value`")
        key = str(key_node.value)
        if key in tree:
            raise ConfigError(
                7, f"the key {key} stands twice", where=f"lines {tree[key].line} and {line}", fix="keep one of them"
            )
        tree[key] = _Lined(loader.construct_object(value_node, deep=True), line)
    return tree


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 300:
        line = node.start_mark.line + 1
        raise ConfigError(8, f"a number of {len(text):,} digits", where=f"line {line}", fix="write a smaller one")
    return int(text)  # YAML 1.1 would read 010 as octal 8


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    line = node.start_mark.line + 1
    shown = str(node.tag).replace(PREFIX, "!!")
    raise ConfigError(9, f"YAML tags ({shown}) are not accepted", where=f"line {line}", fix="write the plain value")


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or this reader would take for something else than text."""


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {}
for _name, (_pattern, _first) in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{PREFIX}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver(f"{PREFIX}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor(f"{PREFIX}map", _mapping)
_Loader.add_constructor(f"{PREFIX}int", _whole_number)
for _name in ("str", "seq", "null", "bool", "float"):
    _Loader.add_constructor(f"{PREFIX}{_name}", getattr(yaml.SafeLoader, f"construct_yaml_{_name}"))
_Loader.add_constructor(None, _refuse_tag)


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree that a YAML text holds, and the line of each key by its dotted path. Raises ConfigError with the place."""
    tree = _parse(text, where)
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "a single value"
        raise ConfigError(8, f"holds {kind} where sections are due", where=where, fix="begin with `model:` and `data:`")
    lines: dict[str, int] = {}
    return _unwrap(tree, "", lines), lines


def read_value(text: str, where: str) -> Any:
    """The value that one short YAML text is. Raises ConfigError."""
    try:
        return _unwrap(_parse(text, where), "", {})
    except ConfigError as error:
        error.where = where  # a line and a column of so little help nobody
        raise


def _parse(text: str, where: str) -> Any:
    text = text.removeprefix("\ufeff")
    try:
        return _Loader(text).get_single_data()
    except ConfigError as error:
        error.where = f"{where} {error.where}".strip()
        raise
    except RecursionError:
        raise ConfigError(9, "nested too deep", where=where, fix="a config has two levels: sections and knobs") from None
    except yaml.YAMLError as error:
        raise _not_yaml(error, text, where) from None


def _not_yaml(error: yaml.YAMLError, text: str, where: str) -> ConfigError:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        problem, said = f"holds the character U+{ord(text[error.position]):04X}", "special characters"
    else:
        problem = getattr(error, "problem", None) or str(error)
        said = f"{getattr(error, 'context', '')} {problem}"
        left_open = "end of stream" in problem or "stream end" in problem
        mark = getattr(error, "context_mark", None) if left_open else None
        mark = mark or getattr(error, "problem_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    fix = next((hint for words, hint in HINTS if words in said), "check the indentation and the colon after each key")
    return ConfigError(8, f"not valid YAML: {problem}", where=f"{where} line {line}, column {column}".strip(), fix=fix)


def _unwrap(tree: Any, prefix: str, lines: dict[str, int]) -> Any:
    if isinstance(tree, _Lined):
        lines[prefix] = tree.line
        return _unwrap(tree.value, prefix, lines)
    if isinstance(tree, dict):
        return {key: _unwrap(value, f"{prefix}.{key}" if prefix else key, lines) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unwrap(value, prefix, {}) for value in tree]
    return tree


def dump_yaml(tree: dict[str, Any]) -> str:
    """Plain YAML that `read_yaml` reads back to the same values."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False))
