"""YAML and overrides in, RunConfig out. Defaults < file < overrides; all faults are told at once, each with its place."""

from __future__ import annotations

import os
import stat
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from llm_finetune_kit.catalog import short_name
from llm_finetune_kit.config import ALIASES, VALUES, RunConfig, combined, knobs
from llm_finetune_kit.errors import ConfigError, nearest
from llm_finetune_kit.plain_yaml import read_value, read_yaml

MOST_BYTES = 200_000  # a config file larger than this is a mistake or an attack
COMMAND_LINE = "command line"
QLORA = "QLoRA is method=lora on a base in 4 bits: model.quantization=nf4"
NAMED_BY = {"model": "name", "data": "train_file"}  # the setting that a plain value in a section's place is meant for
KNOBS = knobs()
SECTIONS = {path[:end] for path in KNOBS for end, letter in enumerate(path) if letter == "."}


@dataclass
class _Draft:
    """A config in the making: values by their knob's path, where each was written, and what to tell the user."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    said: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)  # spellings in the place of now, with their values
    notes: list[str] = field(default_factory=list)
    faults: list[ConfigError] = field(default_factory=list)

    def put(self, path: str, value: Any, place: str) -> None:
        """Take a value from `place`; a later place wins, the same place must not say two things."""
        knob = ALIASES.get(path, path)
        meant = VALUES.get(path.rpartition(".")[2], {}) if knob != path else {}
        value = meant.get(value, value) if isinstance(value, (bool, int, str)) else value
        if knob in SECTIONS:
            self.faults.append(ConfigError(3, f"{knob} is a section", where=place, fix=f"name a setting of it: {_members(knob)}"))
            return
        if knob not in KNOBS:
            self.faults.append(ConfigError(2, f"unknown setting {path}", where=place, fix=_did_you_mean(path)))
            return
        if knob != path:
            self.notes.append(f"{path} is called {knob} here")
        old, where = self.values.get(knob), self.places.get(knob)
        again = where is not None and _source(where) == _source(place)
        self.said[knob] = [*(self.said[knob] if again else ()), (path.rpartition(".")[2], value)]
        if where is not None and value != old:
            value = self._settled(knob, old, value, where, place) if again else value
            if not again and place and where:  # ready values stand nowhere: whoever changes them knows
                self.notes.append(f"{knob} is {_shown(value)} from the {place}, not {_shown(old)} from {where}")
        self.values[knob], self.places[knob] = value, place

    def _settled(self, knob: str, old: Any, value: Any, where: str, place: str) -> Any:
        """What one place means that says two things of a knob: a switch and its kind go together, all else is a fault."""
        meant = combined(self.said[knob])
        self.notes = [note for note in self.notes if not note.startswith(f"{knob} is null: ")]
        if len(meant) == 1:
            if meant[0] is None:
                off, idle = ([name for name, said in self.said[knob] if (said is None) == empty] for empty in (True, False))
                self.notes.append(f"{knob} is null: {off[0]} switches it off, so {idle[0]} counts for nothing")
            return meant[0]
        problem = f"{knob} is given twice: {_shown(old)} and {_shown(value)}"
        self.faults.append(ConfigError(7, problem, where=_both(where, place), fix="keep one of them"))
        return value


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: dict[str, Any] | None = None,
) -> tuple[RunConfig, list[str]]:
    """The config that a file, ready values and `section.key=value` overrides add up to, and notes for the user.

    Raises ConfigError with every fault found, each with its line.

    >>> config, notes = load_config(values={"model_name": "demo", "lora_r": 8}, overrides=["training.max_steps=5"])
    >>> config.lora.r, config.training.max_steps
    (8, 5)
    """
    draft = _Draft()
    if path is not None:
        tree, lines = read_yaml(_read_text(Path(path)), str(path))
        _take_file(draft, tree, lines, str(path))
    for name, value in (values or {}).items():
        draft.put(name, value, "")
    for override in overrides:
        _take_override(draft, override)
    return _finish(draft), draft.notes


def changed(config: RunConfig, values: dict[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """A copy with some knobs set; unlike `RunConfig.with_values` it raises ConfigError for values that cannot be."""
    draft = _Draft(values={path: _get(config.model_dump(), path) for path in KNOBS})
    for name, value in values.items():
        draft.put(name, value, "")
    for override in overrides:
        _take_override(draft, override)
    return _finish(draft)


def _read_text(path: Path) -> str:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            held = sorted(other.name for other in path.glob("*.y*ml"))
            fix = f"name a file in it: {', '.join(held[:4])}" if held else "name a .yaml file"
            raise ConfigError(1, "is a folder, not a config file", where=str(path), fix=fix)
        if not stat.S_ISREG(mode):
            raise ConfigError(1, "is not a regular file", where=str(path), fix="write the config into a file")
        if path.stat().st_size > MOST_BYTES:
            size = f"has {path.stat().st_size:,} bytes; a config has at most {MOST_BYTES:,}"
            raise ConfigError(1, size, where=str(path), fix="name a YAML config; rows belong into data.train_file")
        return _decoded(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(1, f"cannot be read: {reason}", where=str(path), fix="check the path and its rights") from None


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        looks = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:100] else "not UTF-8"
        problem = f"is {looks} text (byte {error.start + 1})"
        raise ConfigError(1, problem, where=f"{where} line {line}", fix="save it as UTF-8") from None


def _missing(path: Path) -> ConfigError:
    known = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = nearest(path.name, known)
    fix = f"did you mean {path.parent / near[0]}?" if near else "check the path; configs/ holds examples"
    if path.name in KNOBS or path.name in ALIASES:
        fix = f"to set a knob write {path.name}=VALUE"
    elif short_name(str(path)):
        fix = f"to name a model write --model {path}"
    return ConfigError(1, "no such config file", where=str(path), fix=fix)


def _members(section: str) -> str:
    return ", ".join(knob.rpartition(".")[2] for knob in KNOBS if knob.rpartition(".")[0] == section)


def _take_file(draft: _Draft, tree: dict[str, Any], lines: dict[str, int], name: str, prefix: str = "") -> None:
    sections = SECTIONS
    for key, value in tree.items():
        path = f"{prefix}{key}"
        place = f"{name} line {lines[path]}" if path in lines else name
        if path not in sections:
            draft.put(path, value, place)
        elif isinstance(value, dict):
            _take_file(draft, value, lines, name, f"{path}.")
        elif value is not None:  # a section whose knobs are all commented out is empty
            problem = f"{path} is {_shown(value)}, expected a section with settings"
            example = f"write {path}: {{{NAMED_BY[path]}: {value}}}; " if path in NAMED_BY else ""
            draft.faults.append(ConfigError(3, problem, where=place, fix=f"{example}settings of {path}: {_members(path)}"))


def _take_override(draft: _Draft, text: str) -> None:
    name, equals, raw = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name:
        problem = f"`{text}` is not of the form section.key=value"
        draft.faults.append(ConfigError(6, problem, where=COMMAND_LINE, fix="for example training.max_steps=100"))
        return
    try:
        value = _typed(raw, ALIASES.get(name, name))
    except ConfigError as error:
        error.problem = f"{name}: {error.problem}"
        draft.faults.append(error)
    else:
        draft.put(name, value, COMMAND_LINE)


def _typed(raw: str, knob: str) -> Any:
    """The value that a word of the command line stands for. Text is taken as it is: `--data "[1] #2.json"` is a file."""
    kinds = _kinds(KNOBS[knob].annotation) if knob in KNOBS else ()
    if str not in kinds or raw.strip() in ("null", "~", "") or raw[:1] in "'\"":
        return read_value(raw, COMMAND_LINE)
    if any((ord(letter) < 32 and letter not in "\n\t") or 0xD800 <= ord(letter) < 0xE000 for letter in raw):
        raise ConfigError(8, f"{raw!r} is not UTF-8 text", where=COMMAND_LINE, fix="write it in another way")
    return raw


def _finish(draft: _Draft) -> RunConfig:
    """The config, or one ConfigError that names every fault."""
    tree: dict[str, Any] = {}
    for path, value in draft.values.items():
        *sections, name = path.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    found = RunConfig()
    try:
        found = RunConfig.model_validate(tree)
    except ValidationError as error:
        draft.faults += _wrong_values(error, draft)
    if draft.faults:
        raise _one_of(sorted(draft.faults, key=_by_line))
    return found


def _wrong_values(error: ValidationError, draft: _Draft) -> list[ConfigError]:
    """One fault per knob: pydantic reports each branch of a union and each entry of a list."""
    kinds: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        path = ".".join(str(part) for part in detail["loc"])
        while path not in KNOBS and "." in path:
            path = path.rpartition(".")[0]
        kinds.setdefault(path, detail["type"])
    return [_wrong_value(path, draft.values[path], kind, draft.places.get(path, "")) for path, kind in kinds.items()]


def _wrong_value(path: str, value: Any, kind: str, place: str) -> ConfigError:
    knob = KNOBS[path]
    number = 3 if kind.endswith(("_type", "_parsing", "literal_error", "_from_float", "value_error")) else 4
    fix = f"correct or remove it; it means: {knob.description}"
    if str in _kinds(knob.annotation) and isinstance(value, (int, float)):
        fix = f'put it in quotes: {path.rpartition(".")[2]}: "{_shown(value)}"'
    if path == "method" and str(value).lower() == "qlora":
        fix = QLORA
    return ConfigError(number, f"{path} is {_shown(value)}, expected {expected(path)}", where=place, fix=fix)


def _one_of(faults: list[ConfigError]) -> ConfigError:
    """The first fault, with the others below it."""
    first, *others = faults
    if others:
        first.why = f"{len(others)} more fault{'s' if len(others) > 1 else ''}:"
    for fault in others:
        same = _source(fault.where) == _source(first.where)
        place = fault.where.removeprefix(f"{_source(first.where)} ") if same else fault.where
        hint = f"; {fault.fix}" if fault.number == 2 else ""
        first.why += f"\n        {place}: {fault.problem}{hint}" if place else f"\n        {fault.problem}{hint}"
    return first


def expected(path: str) -> str:
    """What a knob takes, in words: `a whole number of at least 1`."""
    knob = KNOBS[path]
    limits = _limits(knob.metadata)
    words = []
    for kind in _kinds(knob.annotation):
        if get_origin(kind) is Literal:
            *most, last = get_args(kind)
            words.append(f"{', '.join(most)} or {last}" if most else last)
        elif get_origin(kind) is list:
            words.append(_listed(get_args(kind)[0], bool(words)))
        elif get_origin(kind) is dict:
            words.append("a table such as {a: 2, b: 1}" if get_args(kind)[1] is float else "a table such as {a: b}")
        elif kind is str:
            words.append("a plain name (no slash, no dot in front)" if limits == "pattern" else "text")
        else:
            words.append({bool: "true or false", int: "a whole number", float: "a number"}[kind])
    return " or ".join(words) + (f" {limits}" if limits not in ("", "pattern") else "")


def _listed(kind: Any, named: bool) -> str:
    """A list in words; `named` says that what it may hold was told before."""
    if kind is str or kind == dict[str, Any]:
        return "a list such as [a, b]" if kind is str else "a list of rows"
    return "a list of those" if named else f"a list of {', '.join(get_args(kind))}"


def _limits(metadata: list[Any]) -> str:
    found = {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt", "pattern") if hasattr(one, name)}
    found = {name: limit for name, limit in found.items() if limit is not None}
    if "pattern" in found:
        return "pattern"
    if "ge" in found and "le" in found:
        return f"from {found['ge']:,} to {found['le']:,}"
    words = {"ge": "of at least {:,}", "gt": "above {:,}", "le": "up to {:,}", "lt": "below {:,}"}
    return " and ".join(words[name].format(limit) for name, limit in found.items())


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, None aside."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not type(None))
    return (annotation,)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _did_you_mean(path: str) -> str:
    """The knob or section that was most likely meant: first by its name in the same section, then anywhere."""
    known = list(KNOBS)
    section, _, name = path.rpartition(".")
    by_name = {knob.rpartition(".")[2]: knob for knob in reversed(known)}
    near = [by_name[name]] if name in by_name else []
    if section in SECTIONS:
        near = near or [f"{section}.{word}" for word in nearest(name, _members(section).split(", "))]
    else:
        near = near or nearest(path, known if section else _tops())
    near = near or [by_name[word] for word in nearest(name, set(by_name))]
    if near:
        return f"did you mean {near[0]}?"
    return f"settings of {section}: {_members(section)}" if section in SECTIONS else f"sections: {', '.join(_tops())}"


def _tops() -> list[str]:
    return sorted({knob.partition(".")[0] for knob in KNOBS})


def _get(tree: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return tree


def _source(place: str) -> str:
    return place.rpartition(" line ")[0] or place


def _both(first: str, second: str) -> str:
    source, _, line = first.rpartition(" line ")
    return f"{source} lines {line} and {second.rpartition(' line ')[2]}" if source else first


def _by_line(fault: ConfigError) -> tuple[bool, int]:
    digits = fault.where.rpartition(" line ")[2].partition(",")[0]
    return fault.where == COMMAND_LINE, int(digits) if digits.isdigit() else 0
