"""`finetune explain`: what a setting, an alias of it or an error code means. Made from the tables that the program works by."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, get_args

from llm_finetune_kit.arguments import FLAGS, Parser
from llm_finetune_kit.config import ALIASES, VALUES, RunConfig, Section, knobs
from llm_finetune_kit.error_codes import KINDS, ErrorCode, error_codes
from llm_finetune_kit.errors import UsageError, nearest
from llm_finetune_kit.left_open import LEFT_OPEN
from llm_finetune_kit.plain_yaml import dump_yaml
from llm_finetune_kit.settings import QLORA, expected
from llm_finetune_kit.starter import about

TEXT = """\
explain a setting or an error code

A setting may be named by its path (training.learning_rate), its last part, a spelling of other tools (lr,
per_device_train_batch_size), or nearly so. An error code is what stands in brackets behind the word error (DATA-004).
Without a word the sections are listed; `errors` lists all error codes.
"""
EXAMPLES = (
    "finetune explain learning_rate",
    "finetune explain load_in_4bit",
    "finetune explain training",
    "finetune explain DATA-004",
    "finetune explain errors",
)
CODE = re.compile(r"(?:error)?\[?([A-Za-z]+)-?(\d{1,3})\]?:?")
Pairs = list[tuple[str, str, str]]


def explain_command(words: list[str]) -> int:
    """`finetune explain [KEY]`; returns the exit code."""
    parser = Parser(prog="finetune explain", description=TEXT, examples=EXAMPLES)
    parser.add_argument("key", nargs="?", help="a setting, a section, an error code, or errors")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = ("--json", "--help", "--")  # all others are asked about
    asked = parser.parse_all([word if word in flags else word.removeprefix("--") for word in words])
    key = (asked.key or "").strip()
    found = _meant(key)
    if asked.json:
        told = [one if isinstance(one, dict) else vars(one) | {"exit_code": one.exit_code} for one in found]
        print(json.dumps(told[0] if len(told) == 1 and key else told, indent=2, ensure_ascii=False))
    elif isinstance(found[0], ErrorCode):
        _show_codes(found)
    else:
        _show_settings(found)
    return 0


def _meant(key: str) -> list[Any]:
    """The error codes, settings or sections that a word means. Raises UsageError with the nearest ones."""
    code, sections = CODE.fullmatch(key), _sections()
    kind = (code[1] if code else key).upper()
    if key == "errors" or (kind in KINDS and (code or key not in sections)):
        found = [one for name, one in error_codes().items() if key == "errors" or name.startswith(f"{kind}-")]
        exact = [one for one in found if code and one.code == f"{kind}-{int(code[2]):03d}"]
        if code and not exact:
            fix = f"`finetune explain {kind}` lists those that there are"
            raise UsageError(31, f"there is no error {kind}-{code[2]}", fix=fix)
        return exact or found
    if not key:
        return [{"section": name, "means": means, "settings": _members(name)} for name, means in sections.items()]
    name = key.lower().replace("-", "_").lstrip("_")
    if name in sections and name not in knobs():
        return [setting(path) for path in _members(name)]
    return [setting(path) for path in _paths(name, key)]


def _paths(name: str, asked: str) -> list[str]:
    known = knobs()
    flags = {flag.lstrip("-").replace("-", "_"): path for flag, path in FLAGS.items()}
    for path in (name, ALIASES.get(name), flags.get(name)):
        if path in known:
            return [str(path)]
    same = [path for path in known if path.rpartition(".")[2] == name]
    if same:
        return same
    endings = {alias.rpartition(".")[2]: path for alias, path in ALIASES.items()}
    if name in endings:
        return [endings[name]]
    words = {path.rpartition(".")[2]: path for path in reversed(known)} | {path: path for path in known} | ALIASES | flags
    near = [*dict.fromkeys(words[word] for word in nearest(name, set(words), count=3))]
    hint = f"did you mean {' or '.join(near)}?" if near else "`finetune explain` lists the sections"
    raise UsageError(31, f"there is no setting {asked}", fix=QLORA if name == "qlora" else hint)


def _sections(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every section by its path, with what it is about."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found[prefix + name] = about(kind)
            found |= _sections(kind, f"{prefix}{name}.")
    return found | ({"method": str(RunConfig.model_fields["method"].description)} if not prefix else {})


def _members(section: str) -> list[str]:
    return [path for path in knobs() if path == section or path.rpartition(".")[0] == section]


def setting(path: str) -> dict[str, Any]:
    """All that is known about a knob: what it is, its default and limits, and how it is spelt everywhere."""
    knob = knobs()[path]
    aliases = [alias for alias, meant in ALIASES.items() if meant == path]
    open_to = LEFT_OPEN.get(path)
    example = open_to.example if open_to else _other(knob)
    return {
        "setting": path,
        "means": knob.description,
        "default": knob.default,
        "left_open": open_to.means if open_to else None,
        "takes": expected(path),
        "on_resume": _on_resume(path),
        "flag": next((flag for flag, named in FLAGS.items() if named == path), None),
        "word": f"{path}={_word(example)}",
        "yaml": _yaml(path, example),
        "python": _python(path, example),
        "aliases": aliases,
        "values": {name: VALUES[name] for name in dict.fromkeys(alias.rpartition(".")[2] for alias in aliases) if name in VALUES},
    }


def _other(knob: Any) -> Any:
    """A value that a knob could have instead of its default."""
    if isinstance(knob.default, bool):
        return not knob.default
    if isinstance(knob.default, (int, float)):
        whole = isinstance(knob.default, int)
        return (2 * knob.default or 1) if whole else (knob.default / 2 or 0.1)
    choices = get_args(knob.annotation)
    return next((choice for choice in choices if choice != knob.default), f"my-{knob.default}")


def _on_resume(path: str) -> str:
    from llm_finetune_kit.beginning import COURSE, MECHANICS

    if path == "training.max_steps":
        return "may be raised: finetune resume RUN --max-steps N"
    if path.startswith(MECHANICS):
        return "may be changed"
    return "may be changed with --allow-change" if path in COURSE else "cannot be changed: it would be another run"


def _word(value: Any) -> str:
    """A value as a word of the command line, quoted where a shell would take it apart."""
    import shlex

    if isinstance(value, dict):
        return shlex.quote(f"{{{', '.join(f'{name}: {_item(one)}' for name, one in value.items())}}}")
    if isinstance(value, list):
        return shlex.quote(f"[{', '.join(map(_item, value))}]")
    return shlex.quote(value) if isinstance(value, str) else _scalar(value)


def _item(value: Any) -> str:
    """One thing in a list, in quotes where it is more than a word."""
    plain = not isinstance(value, str) or re.fullmatch(r"[\w.-]+", value)
    return _scalar(value) if plain else json.dumps(value, ensure_ascii=False)


def _scalar(value: Any) -> str:
    return dump_yaml({"x": value}).strip().removeprefix("x: ")


def _yaml(path: str, value: Any) -> str:
    *sections, name = path.split(".")
    tree: Any = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    return dump_yaml(tree).rstrip()


def _python(path: str, value: Any) -> str:
    """The call that sets a knob; its last part is enough where no other knob has the same."""
    from llm_finetune_kit.errors import ConfigError
    from llm_finetune_kit.trainers import knob_named

    if path in ("model.name", "data.train_file"):
        return f"QuickTrainer({value!r}, data)" if path == "model.name" else f"QuickTrainer(model, {value!r})"
    name = path.rpartition(".")[2]
    try:
        plain = knob_named(name) == path
    except ConfigError:
        plain = False
    settings = f"{name}={value!r}" if plain else f'**{{"{path}": {value!r}}}'
    return f"QuickTrainer(model, data, {settings})"


# --- in the terminal ---------------------------------------------------------------------------------------


def _show_settings(found: Sequence[dict[str, Any]]) -> None:
    from llm_finetune_kit.terminal import print_pairs, show

    if "section" in found[0]:
        print_pairs([(one["section"], one["means"], _count(len(one["settings"]))) for one in found])
        show("\n`finetune explain SECTION` lists its settings, `finetune explain errors` the error codes.")
        return
    if len(found) > 2:
        print_pairs([(one["setting"].rpartition(".")[2], one["means"], f"default {_default(one)}") for one in found])
        show(f"\n`finetune explain {found[0]['setting']}` tells all about one of them.")
        return
    for number, one in enumerate(found):
        if number:
            show()
        show(one["setting"], style="bold")
        show(one["means"])
        show()
        print_pairs(_facts(one))


def _count(settings: int) -> str:
    return f"{settings} setting{'' if settings == 1 else 's'}"


def _default(one: dict[str, Any]) -> str:
    return "open" if one["default"] is None and one["left_open"] else _scalar(one["default"])


def _facts(one: dict[str, Any]) -> Pairs:
    tables = [(name, *pair) for name, table in one["values"].items() for pair in table.items()]
    renamed = [f"{name}: {_scalar(theirs)} is {_scalar(ours)}" for name, theirs, ours in tables]
    pairs = [
        ("default", "" if one["left_open"] else _scalar(one["default"]), ""),
        ("left open", one["left_open"] or "", ""),
        ("takes", one["takes"], ""),
        ("on resume", one["on_resume"], ""),
        ("flag", f"{one['flag']} VALUE" if one["flag"] else "", ""),
        ("terminal", one["word"], ""),
        ("YAML", one["yaml"], ""),
        ("Python", one["python"], ""),
        ("also called", ", ".join(one["aliases"]), ""),
        ("their values", "; ".join(renamed), ""),
    ]
    return [pair for pair in pairs if pair[1]]


def _show_codes(found: Sequence[ErrorCode]) -> None:
    from llm_finetune_kit.terminal import print_pairs, show

    if len(found) > 1:
        print_pairs([(one.code, one.means, "") for one in found])
        show("\n`finetune explain CODE` tells how it comes about and what to do.")
        return
    one = found[0]
    show(one.code, style="bold")
    show(one.means)
    show()
    print_pairs([("cause", one.cause, ""), ("fix", one.fix, ""), ("exit code", str(one.exit_code), "")])
