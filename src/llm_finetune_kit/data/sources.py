"""Where rows come from: a file, a sample of the package or a Python list, read whole and checked.

Files hold a JSON list, JSON lines, CSV, TSV or plain text, each also gzipped; the content decides which,
and the name only where the content leaves it open.
"""

# Faults of this module and of files.py, json_flaws.py, json_rows.py and table_rows.py (formats.py has 1 to 19):
#
#   20  no such file                   28  not UTF-8                    35  NaN, Infinity, too large a number
#   21  hub name or web address        29  NUL bytes                    36  lone surrogate
#   22  folder instead of a file       30  damaged gzip                 37  nested too deep
#   23  not a regular file             31  binary kind that is not read 38  not a list of objects
#   24  broken link                    32  kind cannot be told          39  CSV structure
#   25  no permission, or unreadable   33  broken JSON                  40  unknown sample
#   26  too large                      34  duplicate key                41  rows in Python that JSON cannot hold
#   27  empty

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_finetune_kit.data.files import KINDS, LISTED, decode, gunzip, read_file, sample_names, samples_in_words
from llm_finetune_kit.data.json_flaws import first_flaw, in_words, is_sound, skip
from llm_finetune_kit.data.json_rows import is_json, lines_of_rows, read_json_lines, read_json_list
from llm_finetune_kit.data.table_rows import read_documents, read_table
from llm_finetune_kit.errors import DataError, nearest

KIND_NAMES = {"json": "a JSON list", "jsonl": "JSON lines", "csv": "CSV", "tsv": "TSV", "text": "plain text"}


@dataclass(frozen=True, eq=False)
class Source:
    """Rows, and where each one came from."""

    name: str
    rows: list[dict[str, Any]]
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    kind: str = "rows"
    lines: Sequence[int] = ()  # line on which each row begins; of a JSON list it is found only when needed
    reread: Callable[[], str] | None = field(default=None, repr=False)

    def place(self, index: int) -> str:
        """Row `index` as a person finds it: `train.jsonl line 1287`, `data.json row 12 (line 61)`, `rows[3]`."""
        if self.kind == "rows":
            return f"rows[{index}]"
        if self.kind != "json":
            return f"{self.name} line {self.lines[index]}"
        line = f" (line {self._list_lines[index]})" if index < len(self._list_lines) else ""
        return f"{self.name} row {index + 1}{line}"

    def spots(self, indices: Sequence[int]) -> str:
        """Several rows in short, at most ten: `lines 1290, 1302`."""
        shown = [f"rows[{i}]" if self.kind == "rows" else str(self._number(i)) for i in indices[:LISTED]]
        word = {"rows": "", "json": "row"}.get(self.kind, "line")
        plural = "s" if word and len(indices) > 1 else ""
        return f"{word}{plural} ".lstrip() + ", ".join(shown) + (", ..." if len(indices) > LISTED else "")

    def _number(self, index: int) -> int:
        return index + 1 if self.kind == "json" else self.lines[index]

    @cached_property
    def _list_lines(self) -> list[int]:
        """Line of each row of the JSON list, read anew; nothing if the file is no longer the same."""
        try:
            text = self.reread() if self.reread else ""
            return lines_of_rows(text) if text else []
        except (DataError, OSError, ValueError):
            return []


def read_source(spec: str | list[Any] | Path, *, base: Path | None = None) -> Source:
    """The rows of a file (looked up in `base`), of `sample:NAME`, or of a list of dicts or texts."""
    if isinstance(spec, list):
        return _from_list(spec)
    name = str(spec)
    if name.startswith("sample:"):
        return _from_sample(name)
    if not name.strip():
        raise DataError(20, "no data file is named", fix=f"give a local file, or one of {samples_in_words()}")
    path = Path(base or "") / Path(name).expanduser() if name.startswith("~") else Path(base or "") / name
    return _from_bytes(name, path.name, lambda: read_file(path, name))


def _from_sample(name: str) -> Source:
    from importlib.resources import files

    short = name.removeprefix("sample:")
    if short not in sample_names():
        near = nearest(short, sample_names())
        guess = f"did you mean sample:{near[0]}? " if near else ""
        raise DataError(40, f"there is no sample '{short}'", fix=f"{guess}known: {samples_in_words()}")
    sample = files("llm_finetune_kit") / "assets" / "samples" / f"{short}.json"
    return _from_bytes(name, f"{short}.json", sample.read_bytes)


def _from_bytes(name: str, file_name: str, read: Callable[[], bytes]) -> Source:
    raw = read()
    fingerprint = hashlib.sha256(raw).hexdigest()
    text = decode(gunzip(raw, name), name)
    del raw
    kind, note = _kind(text, Path(file_name.lower().removesuffix(".gz")).suffix, name)
    rows, lines, more = _read_text(text, kind, name)

    def reread() -> str:
        again = read()
        same = hashlib.sha256(again).hexdigest() == fingerprint
        return decode(gunzip(again, name), name) if same else ""

    return Source(name, rows, fingerprint, [*note, *more], kind, lines, reread)


def _read_text(text: str, kind: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int], list[str]]:
    if kind == "json":
        return read_json_list(text, name), (), []
    if kind == "jsonl":
        return *read_json_lines(text, name), []
    if kind == "text":
        return read_documents(text, name)
    return *read_table(text, "," if kind == "csv" else "\t", name), []


def _kind(text: str, suffix: str, name: str) -> tuple[str, list[str]]:
    """What the text holds, and a note if its name says otherwise."""
    start = skip(text, 0)
    named = KINDS.get(suffix)
    found = {"[": "json", "{": "jsonl"}.get(text[start])
    if found and named in ("csv", "tsv", "text") and not is_json(text, start, found):
        found = None
    if named == "csv" and not found:
        header = text[start:].partition("\n")[0]
        found = "tsv" if "\t" in header and "," not in header else None
    kind = found or named
    if kind is None:
        fix = f"name it by what it holds: {', '.join(KINDS)}"
        raise DataError(32, f"the kind of file cannot be told from the name ending '{suffix}'", where=name, fix=fix)
    kind = "jsonl" if kind == "json" and not found else kind  # such a file fails, with the line named
    odd = found and named and found != named
    return kind, [f"{name} holds {KIND_NAMES[kind]} although its name ends in {suffix}"] if odd else []


# --- rows in Python ----------------------------------------------------------------------------------------


def _from_list(values: list[Any]) -> Source:
    if not values:
        raise DataError(27, "the list of rows is empty", where="rows", fix="give at least one row")
    rows = [{"text": value} if isinstance(value, str) else value for value in values]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            problem = f"is {in_words(row)}, not a dict or text"
            raise DataError(38, problem, where=f"rows[{index}]", fix="give a list of dicts, or a list of texts")
    try:
        canonical = _canonical(rows)
        sound = is_sound(rows, check_text=True) and all(type(key) is str for row in rows for key in row)
    except (TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise _bad_value(rows)
    return Source("rows", rows, hashlib.sha256(canonical.encode()).hexdigest())


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
