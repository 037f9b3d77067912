"""Rows that Python code hands over: lists, generators, pandas frames and objects of `datasets`, none of them imported."""

# Faults of this module:
#
#   27  no row at all      36, 37  see json_flaws.py      38  a row that is no dict or text      41  not for JSON

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from llm_finetune_kit.data.sources.columnar import plain_rows, plain_value
from llm_finetune_kit.data.sources.folders import beside
from llm_finetune_kit.data.sources.json_flaws import first_flaw, in_words, is_sound
from llm_finetune_kit.errors import DataError

ROWS_FIX = "give a list of dicts, or a list of texts"


def rows_of(values: Any) -> tuple[list[dict[str, Any]], str, list[str]]:
    """Checked rows, their canonical JSON and notes. Generators are read once, to their end. Raises DataError."""
    notes: list[str] = []
    kind = _kind(values)
    if kind == "DatasetDict":
        split = "train" if "train" in values else next(iter(values), "")
        if split:
            notes.append(f"of the splits {', '.join(values)} the rows of '{split}' are used")
        values, kind = (values[split], _kind(values[split])) if split else ([], "")
    if kind == "DataFrame":
        values = _of_frame(values)
    elif kind == "Dataset":
        values = plain_rows(values.with_format("arrow")[:], "rows", notes)
    elif isinstance(values, dict) or not isinstance(values, Iterable):
        raise DataError(38, f"is {in_words(values)}, not a list of rows", where="rows", fix=ROWS_FIX)
    rows, canonical = _checked(list(values))
    return rows, canonical, notes


def part_to_hold_out(values: Any) -> Any | None:
    """The validation (else test) part of a DatasetDict with a training part; None for anything else."""
    if _kind(values) != "DatasetDict" or "train" not in values:
        return None
    part = beside(list(values), "train")
    return None if part is None else values[part]


def _kind(values: Any) -> str:
    """`DataFrame`, `Dataset` or `DatasetDict` (iterable ones too) by the package of the type, without its import."""
    for base in type(values).__mro__:
        package, name = base.__module__.partition(".")[0], base.__name__
        if package == "pandas" and name == "DataFrame":
            return "DataFrame"
        if package == "datasets" and name in ("Dataset", "DatasetDict", "IterableDatasetDict"):
            return name.removeprefix("Iterable")
    return ""


def _of_frame(frame: Any) -> list[dict[str, Any]]:
    """Rows of a pandas frame; a cell without a value (NaN, NaT, NA) is null."""
    columns = []
    for column in frame.columns:
        cells = []
        for index, value in enumerate(frame[column].tolist()):
            try:
                cells.append(plain_value(value))
            except (ValueError, RecursionError) as error:
                where = f"rows[{index}], column {column}"
                fix = "leave this column out, or write it as text or numbers"
                raise DataError(41, f"cannot be written as JSON: {error}", where=where, fix=fix) from None
        columns.append(cells)
    return [dict(zip(frame.columns, row, strict=True)) for row in zip(*columns, strict=True)]


def _checked(values: list[Any]) -> tuple[list[dict[str, Any]], str]:
    if not values:
        raise DataError(27, "the list of rows is empty", where="rows", fix="give at least one row")
    rows = [{"text": value} if isinstance(value, str) else value for value in values]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(38, f"is {in_words(row)}, not a dict or text", where=f"rows[{index}]", fix=ROWS_FIX)
    try:
        canonical = _canonical(rows)
        sound = is_sound(rows, check_text=True) and all(type(key) is str for row in rows for key in row)
    except (TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise _bad_value(rows)
    return rows, canonical


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _bad_value(rows: list[Any]) -> DataError:
    """The first row that JSON cannot hold, and why."""
    for index, row in enumerate(rows):
        where = f"rows[{index}]"
        try:
            reason = next((f"the key {key!r} is not text" for key in row if type(key) is not str), "")
            _canonical(row)
        except (TypeError, ValueError, RecursionError) as error:
            reason = reason or ("it is nested too deep" if isinstance(error, RecursionError) else str(error))
        if reason:
            fix = "use only dicts, lists, text, numbers, true or false and None"
            return DataError(41, f"cannot be written as JSON: {reason}", where=where, fix=fix)
        if flaw := first_flaw(row):
            return DataError(flaw.number, flaw.problem, where=f"{where}, field {flaw.field}", fix=flaw.fix)
    return DataError(41, "the rows cannot be written as JSON", where="rows", fix="use only JSON values")
