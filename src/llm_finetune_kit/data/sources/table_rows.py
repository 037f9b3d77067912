"""Rows from CSV and TSV, documents and dialogues from plain text."""

from __future__ import annotations

import csv
import io
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from llm_finetune_kit.data.cells import unguarded
from llm_finetune_kit.data.sources.files import LISTED
from llm_finetune_kit.errors import DataError

SEPARATOR = "<|endoftext|>"
UTTERANCE_END = "__eou__"  # how DailyDialog's files end an utterance
DAILY_DIALOG = ("dialog", "topic", "act", "emotion")  # the columns of its table, which has no header
LONG_LINE = 500  # characters: lines that are longer on average are documents, not lines of one


def read_table(
    text: str, delimiter: str, name: str, broken: dict[int, str] | None = None
) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """Rows by the names in the header, and their lines; with `broken`, ragged rows are left out and noted there."""
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
                rows.append(dict(zip(header, map(unguarded, cells), strict=True)))
                lines.append(line)
    except csv.Error as error:
        raise _broken_table(name, start, str(error)) from None
    finally:
        csv.field_size_limit(limit)
    if ragged and broken is not None and rows:
        broken |= {line: f"{found} columns where the header has {len(header)}" for line, found in ragged}
    elif ragged:
        raise _ragged(name, ragged, len(header))
    if not rows:
        raise DataError(27, "there is a header but no row", where=name, fix="write rows below the header")
    return rows, lines


def _header(cells: list[str], delimiter: str, where: str) -> list[str]:
    header = [unguarded(cell.strip()) for cell in cells]
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


# --- plain text --------------------------------------------------------------------------------------------


def read_documents(text: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int], list[str]]:
    """Documents of plain text, or dialogues, their lines, and notes; Windows line ends become plain ones.

    Separators divide documents if there are any. Without them, lines with `__eou__` are dialogues, lines of more
    than 500 characters on average (and none blank) are a document each, and anything else is one document.
    """
    text = text.replace("\r\n", "\n")
    if SEPARATOR in text:
        return *_separated(text, name), []
    filled = [(number, line.strip()) for number, line in enumerate(text.rstrip().split("\n"), 1)]
    lines = [(number, line) for number, line in filled if line]
    if 2 * sum(UTTERANCE_END in line for _, line in lines) >= len(lines):
        rows: list[dict[str, Any]] = [{"dialog": _utterances(line)} for _, line in lines]
        said = f"{name} is read as {len(rows):,} dialogues, one to a line, of utterances that end in {UTTERANCE_END}"
    elif 1 < len(filled) == len(lines) and sum(len(line) for _, line in lines) > LONG_LINE * len(lines):
        rows = [{"text": line} for _, line in lines]
        said = f"{name} is read as {len(rows):,} documents, one to a line, as the lines are long"
    else:
        first = text[: len(text) - len(text.lstrip())].count("\n") + 1
        said = f"{name} is read as one document; lines of {SEPARATOR} would separate several"
        return [{"text": text.strip()}], [first], [said]
    return rows, array("L", (number for number, _ in lines)), [said]


def _utterances(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(UTTERANCE_END)]
    return parts if parts[-1] else parts[:-1]


def _separated(text: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int]]:
    rows: list[dict[str, Any]] = []
    lines = array("L")
    line = 1
    for part in text.split(SEPARATOR):
        document = part.strip()
        if document:
            rows.append({"text": document})
            lines.append(line + part.count("\n", 0, len(part) - len(part.lstrip())))
        line += part.count("\n")
    if not rows:
        raise DataError(27, f"there is nothing but {SEPARATOR}", where=name, fix="write text into the file")
    return rows, lines


# --- the table of DailyDialog ------------------------------------------------------------------------------


def is_dialogue_table(text: str) -> bool:
    """Whether the first line is a row like DailyDialog's: utterances, topic, acts and emotions between tabs."""
    first = text.lstrip().partition("\n")[0].rstrip("\r").split("\t")
    return len(first) == len(DAILY_DIALOG) and UTTERANCE_END in first[0]


def read_dialogue_table(text: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int], list[str]]:
    """Rows with dialog (texts), topic, act and emotion (numbers, one for each utterance). No quoting, no header."""
    rows: list[dict[str, Any]] = []
    lines = array("L")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_dialogue_row(line.rstrip("\r").split("\t"), f"{name} line {number}"))
            lines.append(number)
    columns = ", ".join(DAILY_DIALOG)
    return rows, lines, [f"{name} has no header; its columns are read as those of DailyDialog: {columns}"]


def _dialogue_row(cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(DAILY_DIALOG):
        problem = f"{len(cells)} columns where {len(DAILY_DIALOG)} are due"
        raise DataError(39, problem, where=where, fix=f"write {', '.join(DAILY_DIALOG)}, with tabs between")
    dialog = _utterances(cells[0])
    try:
        topic, acts, emotions = int(cells[1]), [int(word) for word in cells[2].split()], [int(word) for word in cells[3].split()]
    except ValueError as error:
        fix = "write topic, acts and emotions as numbers"
        raise DataError(39, f"is no number: {str(error).rpartition(': ')[2]}", where=where, fix=fix) from None
    if not len(dialog) == len(acts) == len(emotions):
        problem = f"{len(dialog)} utterances, but {len(acts)} acts and {len(emotions)} emotions"
        raise DataError(39, problem, where=where, fix="give each utterance one act and one emotion")
    return dict(zip(DAILY_DIALOG, (dialog, topic, acts, emotions), strict=True))
