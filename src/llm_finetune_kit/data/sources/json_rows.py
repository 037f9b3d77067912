"""Rows from JSON lines or from a JSON list; the fault of a faulty file names line, row and field."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from json import JSONDecodeError, JSONDecoder
from typing import Any

from llm_finetune_kit.data.sources.files import LISTED, line_and_column
from llm_finetune_kit.data.sources.json_flaws import (
    MARKING,
    STRICT,
    TOO_DEEP,
    Flaw,
    broken,
    first_flaw,
    flaw_of_row,
    is_sound,
    skip,
)
from llm_finetune_kit.errors import DataError


def is_json(text: str, start: int, kind: str) -> bool:
    try:
        value, end = STRICT.raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    if kind == "jsonl":
        return bool(value) and not text[end:].partition("\n")[0].strip()
    return bool(value) and type(value[0]) is dict


# --- JSON lines --------------------------------------------------------------------------------------------


def read_json_lines(
    text: str, name: str, first_line: int = 1, broken: dict[int, str] | None = None
) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """Rows and their lines, counted from `first_line`. Lines end at \\n only: other separators occur inside texts.

    With `broken`, faulty lines are left out and noted there with their faults, if any sound line is left.
    """
    rows: list[dict[str, Any]] = []
    lines = array("L")
    bad: dict[int, Flaw | None] = {}
    for number, line in enumerate(text.split("\n"), first_line):
        if not line or line.isspace():
            continue
        try:
            row = STRICT.decode(line)
        except (ValueError, RecursionError):
            bad[number] = _flaw_of_line(line) if len(bad) < LISTED else None
            continue
        if type(row) is not dict:
            bad[number] = flaw_of_row(row)
            continue
        rows.append(row)
        lines.append(number)
    if not is_sound(rows, check_text=_may_hold_surrogates(text)):
        bad |= {lines[i]: flaw for i, row in enumerate(rows) if (flaw := flaw_of_row(row))}
    if bad and (broken is None or len(rows) <= sum(number in bad for number in lines)):
        raise _bad_lines(text, name, bad)
    if bad and broken is not None:
        broken |= {number: flaw.problem if flaw else "broken JSON" for number, flaw in bad.items()}
        kept = [index for index, number in enumerate(lines) if number not in bad]
        rows, lines = [rows[index] for index in kept], array("L", (lines[index] for index in kept))
    return rows, lines


def _may_hold_surrogates(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _bad_lines(text: str, name: str, bad: dict[int, Flaw | None]) -> DataError:
    numbers = sorted(bad)
    flaw = bad[numbers[0]]
    assert flaw is not None
    if flaw.number == 33 and (whole := _one_object(text, name)):
        return whole
    shown = ", ".join(map(str, numbers[:LISTED])) + (", ..." if len(numbers) > LISTED else "")
    why = f"{len(numbers):,} lines are faulty: {shown}" if len(numbers) > 1 else ""
    inside = f", field {flaw.field}" if flaw.field else ""
    return DataError(flaw.number, flaw.problem, where=f"{name} line {numbers[0]}{inside}", why=why, fix=flaw.fix)


def _one_object(text: str, name: str) -> DataError | None:
    """The error for objects that are spread over several lines, if that is what the text begins with."""
    start = skip(text, 0)
    try:
        value, end = JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if type(value) is not dict or "\n" not in text[start:end]:
        return None
    line = line_and_column(text, start)[0]
    if skip(text, end) < len(text):
        fix = "write each object on one line, or all of them as a list: [{...}, {...}]"
        return DataError(38, "objects are spread over several lines", where=f"{name} line {line}", fix=fix)
    lists = [key for key, inner in value.items() if type(inner) is list]
    fix = f"keep only the list under '{lists[0]}'" if lists else "put it into a list: [{...}]"
    return DataError(38, "the file holds one object, not a list of rows", where=f"{name} line {line}", fix=fix)


def _flaw_of_line(line: str) -> Flaw:
    try:
        return first_flaw(MARKING.decode(line)) or Flaw(33, "broken JSON", "write the line anew")
    except RecursionError:
        return TOO_DEEP
    except JSONDecodeError as error:
        return broken(line, error, "line")


# --- a JSON list -------------------------------------------------------------------------------------------


def read_json_list(text: str, name: str) -> list[dict[str, Any]]:
    try:
        rows: list[Any] = STRICT.decode(text)
    except (ValueError, RecursionError):
        raise _bad_list(text, name) from None
    if not rows:
        raise DataError(27, "the list is empty", where=name, fix="write rows into it")
    if any(type(row) is not dict for row in rows) or not is_sound(rows, check_text=_may_hold_surrogates(text)):
        raise _bad_list(text, name)
    return rows


def _bad_list(text: str, name: str) -> DataError:
    """The first flaw of a JSON list whose reading failed."""
    index = -1
    try:
        for index, (at, row) in enumerate(_elements(text, MARKING)):
            flaw = row if isinstance(row, Flaw) else flaw_of_row(row)
            if flaw:
                line = line_and_column(text, at)[0]
                inside = f", field {flaw.field}" if flaw.field else ""
                where = f"{name} row {index + 1} (line {line}){inside}"
                return DataError(flaw.number, flaw.problem, where=where, fix=flaw.fix)
    except JSONDecodeError as error:
        flaw = broken(text, error, "file")
        where = f"{name} row {index + 2} (line {line_and_column(text, error.pos)[0]})"
        return DataError(flaw.number, flaw.problem, where=where, fix=flaw.fix)
    return DataError(33, "broken JSON", where=name, fix="write the file anew")


def _elements(text: str, decoder: JSONDecoder) -> Iterator[tuple[int, Any]]:
    """Position and value of each element of a JSON list; JSONDecodeError where it is broken."""
    at = skip(text, skip(text, 0) + 1)
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:
            yield at, TOO_DEEP
            return
        yield at, value
        comma = at = skip(text, end)
        if text[comma : comma + 1] == ",":
            at = skip(text, comma + 1)
            if text[at : at + 1] == "]":
                raise JSONDecodeError("Illegal trailing comma", text, comma)
        elif text[comma : comma + 1] != "]":
            raise JSONDecodeError("Expecting ',' delimiter", text, comma)
    if (rest := skip(text, at + 1)) < len(text):
        raise JSONDecodeError("Extra data", text, rest)


def lines_of_rows(text: str) -> list[int]:
    """The line on which each row of a JSON list begins."""
    return _line_numbers(text, [at for at, _ in _elements(text, JSONDecoder())])


def _line_numbers(text: str, offsets: list[int]) -> list[int]:
    lines, line, before = [], 1, 0
    for offset in offsets:
        line += text.count("\n", before, offset)
        before = offset
        lines.append(line)
    return lines
