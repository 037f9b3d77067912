"""What can be wrong in a row of JSON, and the words for it: the flaw, its field and how to put it right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from typing import Any

from llm_finetune_kit.data.sources.files import line_and_column

DEPTH_LIMIT = 100  # levels of lists and objects in one row
SPACE = re.compile(r"[ \t\n\r]*")
TRAILING_COMMA = re.compile(r",[ \t\n\r]*([}\]])")


@dataclass(frozen=True)
class Flaw:
    """One thing wrong in a row, where the row's text or value is known."""

    number: int
    problem: str
    fix: str
    field: str = ""


def _refuse_constant(word: str) -> Any:
    raise ValueError(word)


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:
        raise ValueError(digits)
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


# Reads good rows at full speed; what it refuses is read again by MARKING, which tells what was wrong.
STRICT = JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _mark_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = Flaw(34, "is given twice in one object", "keep one of the two") if key in found else value
    return found


def _mark_constant(word: str) -> Flaw:
    return Flaw(35, f"is {word[:12]}, which is not a JSON number", "write null or a number, or remove the row")


def _mark_float(digits: str) -> float | Flaw:
    number = float(digits)
    return number if number - number == 0 else _mark_constant(digits)


def _mark_integer(digits: str) -> int | Flaw:
    if len(digits) > 1000:
        return Flaw(35, f"is a number of {len(digits):,} digits", 'write it as text, in "quotes"')
    return int(digits)


MARKING = JSONDecoder(
    object_pairs_hook=_mark_repeats, parse_constant=_mark_constant, parse_float=_mark_float, parse_int=_mark_integer
)
TOO_DEEP = Flaw(37, f"nested too deep: more than {DEPTH_LIMIT} levels", "flatten the row, or remove it")


def first_flaw(value: Any, path: str = "", depth: int = 1) -> Flaw | None:
    """The first mark, lone surrogate or too deep nesting inside `value`."""
    if isinstance(value, Flaw):
        return Flaw(value.number, value.problem, value.fix, path)
    if isinstance(value, str):
        return _surrogate(value, path)
    if not isinstance(value, (dict, list)):
        return None
    if depth > DEPTH_LIMIT:
        return Flaw(TOO_DEEP.number, TOO_DEEP.problem, TOO_DEEP.fix, path.partition("[")[0].partition(".")[0])
    named = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in named:
        step = f"[{key}]" if isinstance(value, list) else f".{key}" if path else str(key)
        flaw = _surrogate(key, path + step) if isinstance(key, str) else None
        flaw = flaw or first_flaw(inner, path + step, depth + 1)
        if flaw:
            return flaw
    return None


def _surrogate(text: str, path: str) -> Flaw | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"holds half a character (\\u{ord(text[error.start]):04x}) at position {error.start}"
        shown = path.encode("ascii", "backslashreplace").decode()
        return Flaw(36, problem, "the text was cut inside an emoji: correct or remove it", shown)
    return None


def is_sound(rows: list[Any], *, check_text: bool) -> bool:
    """Whether no row is nested too deep and (if asked) every text can be written as UTF-8; level by level, fast."""
    level: list[Any] = rows
    for _ in range(DEPTH_LIMIT + 1):
        if not level:
            return True
        inner = [v for part in level for v in (part.values() if type(part) is dict else part)]
        try:
            if check_text:
                "\n".join(v for v in inner if type(v) is str).encode()
                "\n".join(key for part in level if type(part) is dict for key in part).encode()
        except UnicodeEncodeError:
            return False
        level = [v for v in inner if type(v) is dict or type(v) is list]
    return False


def flaw_of_row(row: Any) -> Flaw | None:
    if type(row) is not dict:
        return Flaw(38, f"is {in_words(row)}, not an object with columns", 'write each row as {"column": ...}')
    return first_flaw(row)


def in_words(value: Any) -> str:
    """What kind of value JSON calls this."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a Python {type(value).__name__}")


def skip(text: str, at: int) -> int:
    """The place after the white space that begins at `at`."""
    found = SPACE.match(text, at)
    return found.end() if found else at


# --- broken JSON -------------------------------------------------------------------------------------------


def broken(text: str, error: JSONDecodeError, whole: str) -> Flaw:
    """Broken JSON: the column, what is there and how to put it right."""
    at = error.pos
    comma = TRAILING_COMMA.match(text, text.rfind(",", max(0, at - 100), at + 1)) if at else None
    if comma and comma.end() > at and not error.msg.startswith(("Unterminated", "Invalid")):
        at, what, fix = comma.start(), f"a trailing comma before '{comma[1]}'", "remove that comma"
    else:
        what, fix = _cause(text, error, whole)
    column = line_and_column(text, at)[1]
    around = text[max(0, at - 30) : at + 30].strip("\r\n").encode("utf-8", "replace").decode()
    near = around.replace("\n", "\\n").replace("\r", "")
    return Flaw(33, f"broken JSON at column {column}: {what}, near: {near}", fix)


def _cause(text: str, error: JSONDecodeError, whole: str) -> tuple[str, str]:
    at, message = error.pos, error.msg
    rest = text[at : at + 6]
    if message.startswith("Unterminated string"):
        return "a text is not closed", 'close it with ", and write line breaks inside it as \\n'
    if message.startswith("Invalid control character"):
        return f"a raw control character (U+{ord(text[at]):04X}) inside a text", "write it as \\n, \\t or \\u00XX"
    if message.startswith("Invalid \\"):
        return "a backslash that begins no known escape", "write a backslash as two: \\\\"
    if skip(text, at) >= len(text):
        hint = "each row must be complete on its own line" if whole == "line" else "it was cut short: copy it again"
        return f"the {whole} ends in the middle of a value", hint
    if rest[0] == "'":
        return "single quotes", 'JSON needs double quotes: "..."; write with json.dumps, not with print'
    if (word := re.match("None|True|False", rest)) is not None:
        return f"the Python word {word[0]}", "JSON writes null, true, false; write with json.dumps, not with print"
    if message == "Extra data" and rest[0] == ",":
        return "a comma after the row", "remove it: JSON lines have no commas between rows"
    if message == "Extra data":
        return "a second value follows the first", f"begin a new line here{'' if whole == 'line' else ', or remove it'}"
    if message.startswith("Expecting ',' delimiter"):
        return "a comma is missing", 'put a comma here; a quote inside a text is written as \\"'
    return message[0].lower() + message[1:], "correct this place"
