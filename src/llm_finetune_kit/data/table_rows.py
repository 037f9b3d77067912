"""Rows from CSV and TSV, and documents from plain text."""

from __future__ import annotations

import csv
import io
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from llm_finetune_kit.data.files import LISTED
from llm_finetune_kit.errors import DataError

SEPARATOR = "<|endoftext|>"


def read_table(text: str, delimiter: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int]]:
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    rows: list[dict[str, Any]] = []
    lines = array("L")
    header: list[str] = []
    ragged: list[tuple[int, int]] = []
    start, limit = 1, csv.field_size_limit(sys.maxsize)
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, delimiter, f"{name} line {line}")
            elif len(cells) != len(header):
                ragged.append((line, len(cells)))
            else:
                rows.append(dict(zip(header, cells, strict=True)))
                lines.append(line)
    except csv.Error as error:
        raise _broken_table(name, start, str(error)) from None
    finally:
        csv.field_size_limit(limit)
    if ragged:
        raise _ragged(name, ragged, len(header))
    if not rows:
        raise DataError(27, "there is a header but no row", where=name, fix="write rows below the header")
    return rows, lines


def _header(cells: list[str], delimiter: str, where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [cell for cell in header if header.count(cell) > 1]
    if twice:
        columns = [i for i, cell in enumerate(header, 1) if cell == twice[0]]
        problem = f"two columns are named '{twice[0]}' (columns {columns[0]} and {columns[1]})"
        raise DataError(39, problem, where=where, fix="rename one of them")
    other = next((mark for mark in ";|\t," if len(header) == 1 and mark in header[0] and mark != delimiter), None)
    if other:
        problem = f"one column only, '{header[0][:60]}': the columns seem to be separated by '{other}'"
        raise DataError(39, problem, where=where, fix="save the table with commas (.csv) or tabs (.tsv)")
    return header


def _broken_table(name: str, line: int, message: str) -> DataError:
    causes = {
        "unexpected end": ("a quote is opened here and never closed", 'close it; a quote inside a cell is written ""'),
        "new-line character": ("a carriage return outside quotes", "save the table with Unix or Windows line ends"),
        "expected after": ("text follows a closing quote", 'a quote inside a quoted cell is written ""'),
    }
    what, fix = next((cause for part, cause in causes.items() if part in message), (message, "correct this row"))
    return DataError(39, what, where=f"{name} line {line}", fix=fix)


def _ragged(name: str, ragged: list[tuple[int, int]], due: int) -> DataError:
    line, found = ragged[0]
    shown = ", ".join(str(number) for number, _ in ragged[:LISTED]) + (", ..." if len(ragged) > LISTED else "")
    why = f"{len(ragged):,} rows differ from the header: lines {shown}" if len(ragged) > 1 else ""
    fix = "put quotes around cells that hold the separator, or correct the row"
    return DataError(39, f"{found} columns where the header has {due}", where=f"{name} line {line}", why=why, fix=fix)


def read_documents(text: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int], list[str]]:
    """Documents between markers, without blank ends; Windows line ends become plain ones."""
    rows: list[dict[str, Any]] = []
    lines = array("L")
    line = 1
    for part in text.replace("\r\n", "\n").split(SEPARATOR):
        document = part.strip()
        if document:
            rows.append({"text": document})
            lines.append(line + part.count("\n", 0, len(part) - len(part.lstrip())))
        line += part.count("\n")
    if not rows:
        raise DataError(27, f"there is nothing but {SEPARATOR}", where=name, fix="write text into the file")
    one = f"{name} is read as one document; lines of {SEPARATOR} would separate several"
    return rows, lines, [one] if len(rows) == 1 else []
