"""From the bytes of a file to its rows: the content decides what kind it is, the name only where that is left open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_finetune_kit.data.sources.columnar import columnar_kind, read_columnar, refuse_wrong_magic
from llm_finetune_kit.data.sources.files import KINDS, decode, refuse_long_lines
from llm_finetune_kit.data.sources.json_flaws import skip
from llm_finetune_kit.data.sources.json_rows import is_json, read_json_lines, read_json_list
from llm_finetune_kit.data.sources.table_rows import is_dialogue_table, read_dialogue_table, read_documents, read_table
from llm_finetune_kit.errors import DataError

KIND_NAMES = {
    "json": "a JSON list", "jsonl": "JSON lines", "csv": "CSV", "tsv": "TSV", "text": "plain text",
    "parquet": "Parquet", "arrow": "Arrow",
}  # fmt: skip
Rows = list[dict[str, Any]]


def columnar_rows(raw: bytes, file_name: str, name: str) -> tuple[str, Rows, list[str]] | None:
    """Kind, rows and notes if the bytes are Parquet or Arrow, else None. Raises DataError naming `name`."""
    kind, suffix = columnar_kind(raw), _suffix(file_name)
    if kind is None:
        return None
    rows, notes = read_columnar(raw, kind, name)
    return kind, rows, [*_odd_name(name, suffix, kind), *notes]


def text_in(raw: bytes, file_name: str, name: str) -> str:
    """The text of any other file. Raises DataError for what is no text, or has a line that is too long."""
    named = KINDS.get(_suffix(file_name))
    start = raw[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if named in ("parquet", "arrow") and start not in (b"{", b"["):
        refuse_wrong_magic(raw, named, name)
    if named in ("csv", "tsv") or start == b"{":
        refuse_long_lines(raw, name)
    return decode(raw, name)


def text_rows(
    text: str, file_name: str, name: str, broken: dict[int, str] | None = None
) -> tuple[str, Rows, Sequence[int], list[str]]:
    """Kind, rows, the line of each (none for a JSON list) and notes. Raises DataError naming `name`.

    With `broken`, lines that cannot be read are left out and noted there.
    """
    kind, notes = _kind(text, _suffix(file_name), name)
    rows, lines, more = _read_text(text, kind, name, broken)
    return kind, rows, lines, [*notes, *more]


def _suffix(file_name: str) -> str:
    return Path(file_name.lower().removesuffix(".gz")).suffix


def _read_text(text: str, kind: str, name: str, broken: dict[int, str] | None) -> tuple[Rows, Sequence[int], list[str]]:
    if kind == "json":
        return read_json_list(text, name), (), []
    if kind == "jsonl":
        return *read_json_lines(text, name, broken=broken), []
    if kind == "text":
        return read_documents(text, name)
    if kind == "tsv" and is_dialogue_table(text):
        return read_dialogue_table(text, name)
    delimiter = "\t" if kind == "tsv" else _comma(text)
    notes = [f"{name}: columns are separated by semicolons"] if delimiter == ";" else []
    return *read_table(text, delimiter, name, broken), notes


def _comma(text: str) -> str:
    """What separates the columns: spreadsheets write semicolons where the comma is a decimal point."""
    header = text.lstrip().partition("\n")[0]
    return ";" if ";" in header and "," not in header else ","


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
    return kind, _odd_name(name, suffix, kind)


def _odd_name(name: str, suffix: str, kind: str) -> list[str]:
    odd = suffix in KINDS and KINDS[suffix] != kind
    return [f"{name} holds {KIND_NAMES[kind]} although its name ends in {suffix}"] if odd else []
