"""Where rows come from: a file, a sample of the package or a Python list, read whole and checked.

Files hold a JSON list, JSON lines, CSV, TSV or plain text, each also gzipped; the content decides which,
and the name only where the content leaves it open.
"""

# Faults of this module (formats.py has 1 to 19):
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

import csv
import hashlib
import io
import json
import os
import re
import stat
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import DataError, nearest

SIZE_LIMIT = 2 * 1024**3  # bytes, also after gunzip: a file is read whole
DEPTH_LIMIT = 100  # levels of lists and objects in one row
LISTED = 10  # faulty lines named in one message
SEPARATOR = "<|endoftext|>"

KINDS = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
KIND_NAMES = {"json": "a JSON list", "jsonl": "JSON lines", "csv": "CSV", "tsv": "TSV", "text": "plain text"}
BINARY = {
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\x28\xb5\x2f\xfd": "a zstd archive", b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive",
    b"%PDF": "a PDF file", b"SQLite format 3": "an SQLite database",
}  # fmt: skip
WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


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
            return _line_numbers(text, [at for at, _ in _elements(text, JSONDecoder())]) if text else []
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
        raise DataError(20, "no data file is named", fix=f"give a local file, or one of {_samples_in_words()}")
    path = Path(base or "") / Path(name).expanduser() if name.startswith("~") else Path(base or "") / name
    return _from_bytes(name, path.name, lambda: _read_file(path, name))


def _from_sample(name: str) -> Source:
    from importlib.resources import files

    short = name.removeprefix("sample:")
    if short not in _samples():
        near = nearest(short, _samples())
        guess = f"did you mean sample:{near[0]}? " if near else ""
        raise DataError(40, f"there is no sample '{short}'", fix=f"{guess}known: {_samples_in_words()}")
    sample = files("llm_finetune_kit") / "assets" / "samples" / f"{short}.json"
    return _from_bytes(name, f"{short}.json", sample.read_bytes)


def _samples() -> list[str]:
    from importlib.resources import files

    entries = (files("llm_finetune_kit") / "assets" / "samples").iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json"))


def _samples_in_words() -> str:
    return ", ".join(f"sample:{short}" for short in _samples())


def _from_bytes(name: str, file_name: str, read: Callable[[], bytes]) -> Source:
    raw = read()
    fingerprint = hashlib.sha256(raw).hexdigest()
    text = _decode(_gunzip(raw, name), name)
    del raw
    kind, note = _kind(text, Path(file_name.lower().removesuffix(".gz")).suffix, name)
    rows, lines, more = _read_text(text, kind, name)

    def reread() -> str:
        again = read()
        same = hashlib.sha256(again).hexdigest() == fingerprint
        return _decode(_gunzip(again, name), name) if same else ""

    return Source(name, rows, fingerprint, [*note, *more], kind, lines, reread)


def _read_text(text: str, kind: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int], list[str]]:
    if kind == "json":
        return _read_json_list(text, name), (), []
    if kind == "jsonl":
        return *_read_json_lines(text, name), []
    if kind == "text":
        return _read_documents(text, name)
    return *_read_table(text, "," if kind == "csv" else "\t", name), []


# --- files and bytes ---------------------------------------------------------------------------------------


def _read_file(path: Path, name: str) -> bytes:
    """All bytes of a regular file; anything else is named, and never opened (a FIFO would hang)."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise _not_a_file(path, name, info.st_mode)
        if info.st_size > SIZE_LIMIT:
            raise _too_large(name, f"has {info.st_size / 1024**3:.1f} GB")
        with open(path, "rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise _missing(path, name) from None
    except PermissionError:
        raise DataError(25, "may not be read by you", where=name, fix=f"chmod u+r '{name}', or copy it") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(25, f"cannot be read: {reason}", where=name, fix="check the name and the disk") from None
    if not raw:
        raise DataError(27, "the file is empty (0 bytes)", where=name, fix="write the rows into it, or name another")
    return raw


def _not_a_file(path: Path, name: str, mode: int) -> DataError:
    if stat.S_ISDIR(mode):
        inside = [entry for entry in _entries(path) if Path(entry.removesuffix(".gz")).suffix in KINDS]
        seen = f"one of its files: {', '.join(inside[:LISTED])}" if inside else "a file; it holds no data file"
        return DataError(22, "is a folder, not a file", where=name, fix=f"name {seen}")
    kinds = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket"}
    what = kinds.get(stat.S_IFMT(mode), "a device")
    return DataError(23, f"is {what}, not a file", where=name, fix="write the data into a regular file first")


def _too_large(name: str, size: str) -> DataError:
    return DataError(26, f"{size}, more than the limit of 2 GB", where=name, why="files are read whole", fix="split the file")


def _missing(path: Path, name: str) -> DataError:
    if path.is_symlink():
        target = os.readlink(path)
        return DataError(24, f"is a link to '{target}', which does not exist", where=name, fix="repair the link")
    if re.match(r"https?://", name):
        return DataError(21, "web addresses are not read", where=name, fix="download the file and name it here")
    near = nearest(path.name, _entries(path.parent), 3)
    sample = [f"sample:{name}"] if name in _samples() else []
    guess = f"did you mean {' or '.join(sample + near)}? " if sample or near else ""
    owner, _, rest = name.partition("/")
    bare = re.fullmatch(r"[\w-]+|[\w.-]+/[\w.-]+", name) and path.suffix not in (*KINDS, ".gz")
    if bare and not (rest and (path.parent.is_dir() or owner in (".", ".."))):
        problem = f"'{name}' is no file here, and hub datasets are not read yet"
        return DataError(21, problem, fix=f"{guess}give a local file, or one of {_samples_in_words()}")
    if not path.parent.is_dir():
        return DataError(20, f"the folder '{path.parent}' does not exist", where=name, fix="check the path")
    return DataError(20, "there is no such file", where=name, fix=guess.strip() or "check the path")


def _entries(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for _, entry in zip(range(1000), entries, strict=False))
    except OSError:
        return []


def _gunzip(raw: bytes, name: str) -> bytes:
    """The bytes themselves, or what is inside if they are gzip; stops at the size limit."""
    if raw[:2] != b"\x1f\x8b":
        return raw
    parts, size, rest = [], 0, raw
    try:
        while rest[:2] == b"\x1f\x8b":
            unzip = zlib.decompressobj(wbits=31)
            parts.append(unzip.decompress(rest, SIZE_LIMIT + 1 - size))
            size += len(parts[-1])
            if size > SIZE_LIMIT:
                raise _too_large(name, "holds more than 2 GB when unpacked")
            if not unzip.eof:
                raise zlib.error("it ends too early")
            rest = unzip.unused_data
    except zlib.error as error:
        fix = "copy or download it again, or write it anew with gzip"
        raise DataError(30, f"is a damaged gzip file ({error})", where=name, fix=fix) from None
    return b"".join(parts) if len(parts) > 1 else parts[0]


def _decode(raw: bytes, name: str) -> str:
    for magic, what in BINARY.items():
        if raw.startswith(magic):
            raise DataError(31, f"is {what}, which is not read yet", where=name, fix="export the rows as JSON lines")
    wide = next((coding for mark, coding in WIDE_MARKS.items() if raw.startswith(mark)), "") or _wide_guess(raw)
    if wide:
        raise _wrong_encoding(name, f"is {wide} text, not UTF-8", wide)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_and_column_of_byte(raw, error.start)
        if error.end >= len(raw) and "unexpected end" in error.reason:
            problem = f"ends in the middle of a character (byte {error.start}, line {line})"
            fix = "the file was cut short: copy or download it again"
            raise DataError(28, problem, where=name, fix=fix) from None
        guess = _narrow_guess(raw)
        problem = f"is not UTF-8: byte 0x{raw[error.start]:02X} at offset {error.start}, line {line}, column {column}"
        raise _wrong_encoding(name, f"{problem}; it looks like {guess}", guess) from None
    nul = text.find("\0")
    if nul >= 0:
        line, column = _line_and_column(text, nul)
        problem = f"holds a NUL byte at line {line}, column {column} ({text.count(chr(0)):,} in all)"
        raise DataError(29, problem, where=name, fix=f"remove them: tr -d '\\000' < '{name}' > new-file")
    if not text or text.isspace():
        count = text.count("\n") + (not text.endswith("\n"))
        problem = f"the file is empty: blank in all of its {count} lines"
        raise DataError(27, problem, where=name, fix="write rows into it")
    return text


def _wide_guess(raw: bytes) -> str:
    """UTF-16 without its mark shows as a NUL in every second byte."""
    start = raw[:4096]
    low, high = start[0::2].count(0), start[1::2].count(0)
    if not start or max(low, high) * 10 < len(start) * 3:
        return ""
    return "UTF-16BE" if low > high else "UTF-16LE"


def _narrow_guess(raw: bytes) -> str:
    """GBK writes its characters in pairs of bytes; Windows-1252, like Latin-1, in single ones."""
    runs = re.findall(rb"[\x80-\xff]+", raw[:1_000_000])
    paired = sum(len(run) % 2 == 0 for run in runs)
    return "GBK" if runs and paired > 0.8 * len(runs) else "Windows-1252"


def _wrong_encoding(name: str, problem: str, coding: str) -> DataError:
    asked = f"'{name}'" if not name.endswith(".gz") else f"<(zcat '{name}')"
    return DataError(28, problem, where=name, fix=f"iconv -f {coding.upper()} -t UTF-8 {asked} > new-file")


def _line_and_column_of_byte(raw: bytes, offset: int) -> tuple[int, int]:
    return raw.count(b"\n", 0, offset) + 1, offset - raw.rfind(b"\n", 0, offset)


def _line_and_column(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _line_numbers(text: str, offsets: list[int]) -> list[int]:
    lines, line, before = [], 1, 0
    for offset in offsets:
        line += text.count("\n", before, offset)
        before = offset
        lines.append(line)
    return lines


def _kind(text: str, suffix: str, name: str) -> tuple[str, list[str]]:
    """What the text holds, and a note if its name says otherwise."""
    start = _skip(text, 0)
    named = KINDS.get(suffix)
    found = {"[": "json", "{": "jsonl"}.get(text[start])
    if found and named in ("csv", "tsv", "text") and not _is_json(text, start, found):
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


def _is_json(text: str, start: int, kind: str) -> bool:
    try:
        value, end = STRICT.raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    if kind == "jsonl":
        return bool(value) and not text[end:].partition("\n")[0].strip()
    return bool(value) and type(value[0]) is dict


# --- JSON --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flaw:
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
        found[key] = _Flaw(34, "is given twice in one object", "keep one of the two") if key in found else value
    return found


def _mark_constant(word: str) -> _Flaw:
    return _Flaw(35, f"is {word[:12]}, which is not a JSON number", "write null or a number, or remove the row")


def _mark_float(digits: str) -> float | _Flaw:
    number = float(digits)
    return number if number - number == 0 else _mark_constant(digits)


def _mark_integer(digits: str) -> int | _Flaw:
    if len(digits) > 1000:
        return _Flaw(35, f"is a number of {len(digits):,} digits", 'write it as text, in "quotes"')
    return int(digits)


MARKING = JSONDecoder(
    object_pairs_hook=_mark_repeats, parse_constant=_mark_constant, parse_float=_mark_float, parse_int=_mark_integer
)
TOO_DEEP = _Flaw(37, f"nested too deep: more than {DEPTH_LIMIT} levels", "flatten the row, or remove it")


def _first_flaw(value: Any, path: str = "", depth: int = 1) -> _Flaw | None:
    """The first mark, lone surrogate or too deep nesting inside `value`."""
    if isinstance(value, _Flaw):
        return _Flaw(value.number, value.problem, value.fix, path)
    if isinstance(value, str):
        return _surrogate(value, path)
    if not isinstance(value, (dict, list)):
        return None
    if depth > DEPTH_LIMIT:
        return _Flaw(TOO_DEEP.number, TOO_DEEP.problem, TOO_DEEP.fix, path.partition("[")[0].partition(".")[0])
    named = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in named:
        step = f"[{key}]" if isinstance(value, list) else f".{key}" if path else str(key)
        flaw = _surrogate(key, path + step) if isinstance(key, str) else None
        flaw = flaw or _first_flaw(inner, path + step, depth + 1)
        if flaw:
            return flaw
    return None


def _surrogate(text: str, path: str) -> _Flaw | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"holds half a character (\\u{ord(text[error.start]):04x}) at position {error.start}"
        shown = path.encode("ascii", "backslashreplace").decode()
        return _Flaw(36, problem, "the text was cut inside an emoji: correct or remove it", shown)
    return None


def _sound(rows: list[Any], *, check_text: bool) -> bool:
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


def _flaw_of_row(row: Any) -> _Flaw | None:
    if type(row) is not dict:
        return _Flaw(38, f"is {in_words(row)}, not an object with columns", 'write each row as {"column": ...}')
    return _first_flaw(row)


def in_words(value: Any) -> str:
    """What kind of value JSON calls this."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a Python {type(value).__name__}")


def _read_json_lines(text: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """Rows and their lines. Lines end at \\n only: other line separators occur inside texts."""
    rows: list[dict[str, Any]] = []
    lines = array("L")
    bad: dict[int, _Flaw | None] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            row = STRICT.decode(line)
        except (ValueError, RecursionError):
            bad[number] = _flaw_of_line(line) if len(bad) < LISTED else None
            continue
        if type(row) is not dict:
            bad[number] = _flaw_of_row(row)
            continue
        rows.append(row)
        lines.append(number)
    if not _sound(rows, check_text=_may_hold_surrogates(text)):
        bad |= {lines[i]: flaw for i, row in enumerate(rows) if (flaw := _flaw_of_row(row))}
    if bad:
        raise _bad_lines(text, name, bad)
    return rows, lines


def _may_hold_surrogates(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _bad_lines(text: str, name: str, bad: dict[int, _Flaw | None]) -> DataError:
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
    start = _skip(text, 0)
    try:
        value, end = JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if type(value) is not dict or "\n" not in text[start:end]:
        return None
    line = _line_and_column(text, start)[0]
    if _skip(text, end) < len(text):
        fix = "write each object on one line, or all of them as a list: [{...}, {...}]"
        return DataError(38, "objects are spread over several lines", where=f"{name} line {line}", fix=fix)
    lists = [key for key, inner in value.items() if type(inner) is list]
    fix = f"keep only the list under '{lists[0]}'" if lists else "put it into a list: [{...}]"
    return DataError(38, "the file holds one object, not a list of rows", where=f"{name} line {line}", fix=fix)


def _flaw_of_line(line: str) -> _Flaw:
    try:
        return _first_flaw(MARKING.decode(line)) or _Flaw(33, "broken JSON", "write the line anew")
    except RecursionError:
        return TOO_DEEP
    except JSONDecodeError as error:
        return _broken(line, error, "line")


def _read_json_list(text: str, name: str) -> list[dict[str, Any]]:
    try:
        rows: list[Any] = STRICT.decode(text)
    except (ValueError, RecursionError):
        raise _bad_list(text, name) from None
    if not rows:
        raise DataError(27, "the list is empty", where=name, fix="write rows into it")
    if any(type(row) is not dict for row in rows) or not _sound(rows, check_text=_may_hold_surrogates(text)):
        raise _bad_list(text, name)
    return rows


def _bad_list(text: str, name: str) -> DataError:
    """The first flaw of a JSON list whose reading failed."""
    index = -1
    try:
        for index, (at, row) in enumerate(_elements(text, MARKING)):
            flaw = row if isinstance(row, _Flaw) else _flaw_of_row(row)
            if flaw:
                line = _line_and_column(text, at)[0]
                inside = f", field {flaw.field}" if flaw.field else ""
                where = f"{name} row {index + 1} (line {line}){inside}"
                return DataError(flaw.number, flaw.problem, where=where, fix=flaw.fix)
    except JSONDecodeError as error:
        flaw = _broken(text, error, "file")
        where = f"{name} row {index + 2} (line {_line_and_column(text, error.pos)[0]})"
        return DataError(flaw.number, flaw.problem, where=where, fix=flaw.fix)
    return DataError(33, "broken JSON", where=name, fix="write the file anew")


def _skip(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


SPACE = re.compile(r"[ \t\n\r]*")
TRAILING_COMMA = re.compile(r",[ \t\n\r]*([}\]])")


def _elements(text: str, decoder: JSONDecoder) -> Iterator[tuple[int, Any]]:
    """Position and value of each element of a JSON list; JSONDecodeError where it is broken."""
    at = _skip(text, _skip(text, 0) + 1)
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:
            yield at, TOO_DEEP
            return
        yield at, value
        comma = at = _skip(text, end)
        if text[comma : comma + 1] == ",":
            at = _skip(text, comma + 1)
            if text[at : at + 1] == "]":
                raise JSONDecodeError("Illegal trailing comma", text, comma)
        elif text[comma : comma + 1] != "]":
            raise JSONDecodeError("Expecting ',' delimiter", text, comma)
    if (rest := _skip(text, at + 1)) < len(text):
        raise JSONDecodeError("Extra data", text, rest)


def _broken(text: str, error: JSONDecodeError, whole: str) -> _Flaw:
    """Broken JSON: the column, what is there and how to put it right."""
    at = error.pos
    comma = TRAILING_COMMA.match(text, text.rfind(",", max(0, at - 100), at + 1)) if at else None
    if comma and comma.end() > at and not error.msg.startswith(("Unterminated", "Invalid")):
        at, what, fix = comma.start(), f"a trailing comma before '{comma[1]}'", "remove that comma"
    else:
        what, fix = _cause(text, error, whole)
    column = _line_and_column(text, at)[1]
    around = text[max(0, at - 30) : at + 30].strip("\r\n").encode("utf-8", "replace").decode()
    near = around.replace("\n", "\\n").replace("\r", "")
    return _Flaw(33, f"broken JSON at column {column}: {what}, near: {near}", fix)


def _cause(text: str, error: JSONDecodeError, whole: str) -> tuple[str, str]:
    at, message = error.pos, error.msg
    rest = text[at : at + 6]
    if message.startswith("Unterminated string"):
        return "a text is not closed", 'close it with ", and write line breaks inside it as \\n'
    if message.startswith("Invalid control character"):
        return f"a raw control character (U+{ord(text[at]):04X}) inside a text", "write it as \\n, \\t or \\u00XX"
    if message.startswith("Invalid \\"):
        return "a backslash that begins no known escape", "write a backslash as two: \\\\"
    if _skip(text, at) >= len(text):
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


# --- tables and plain text ---------------------------------------------------------------------------------


def _read_table(text: str, delimiter: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int]]:
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


def _read_documents(text: str, name: str) -> tuple[list[dict[str, Any]], Sequence[int], list[str]]:
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
        sound = _sound(rows, check_text=True) and all(type(key) is str for row in rows for key in row)
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
        if flaw := _first_flaw(row):
            return DataError(flaw.number, flaw.problem, where=f"{where}, field {flaw.field}", fix=flaw.fix)
    return DataError(41, "the rows cannot be written as JSON", where="rows", fix="use only JSON values")
