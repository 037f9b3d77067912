"""From the name of a file to its text: opened with care, unpacked if it is gzip, and decoded as UTF-8 or refused."""

from __future__ import annotations

import os
import re
import stat
import zlib
from pathlib import Path

from llm_finetune_kit.errors import DataError, nearest

SIZE_LIMIT = 2 * 1024**3  # bytes, also after gunzip: a file is read whole
LINE_LIMIT = 64 * 1024**2  # bytes of one line of JSON lines or of a table: no row to train on is longer
NAMED_SETS = ("alpaca", "daily_dialog", "both")  # data sets with a name of their own, beside samples
LISTED = 10  # faulty lines named in one message

KINDS = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".txt": "text", ".text": "text", ".md": "text", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
BINARY = {
    b"FEA1": "a Feather file of the first version", b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\x28\xb5\x2f\xfd": "a zstd archive", b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive",
    b"%PDF": "a PDF file", b"SQLite format 3": "an SQLite database",
}  # fmt: skip
WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


ENCODINGS = [
    "cp1252", "gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255",
    "cp1256",
]  # fmt: skip


def sample_names() -> list[str]:
    from importlib.resources import files

    entries = (files("llm_finetune_kit") / "assets" / "samples").iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json"))


def samples_in_words() -> str:
    return ", ".join(f"sample:{short}" for short in sample_names())


def read_file(path: Path, name: str) -> bytes:
    """All bytes of a regular file; anything else is named, and never opened (a FIFO would hang)."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise _not_a_file(name, info.st_mode)
        if info.st_size > SIZE_LIMIT:
            raise _too_large(name, f"has {info.st_size / 1024**3:.1f} GB")
        with open(path, "rb") as file:
            raw = file.read(info.st_size + 1)
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


def _not_a_file(name: str, mode: int) -> DataError:
    kinds = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    what = kinds.get(stat.S_IFMT(mode), "a device")
    return DataError(23, f"is {what}, not a file", where=name, fix="write the data into a regular file first")


def _too_large(name: str, size: str) -> DataError:
    return DataError(26, f"{size}, more than the limit of 2 GB", where=name, why="files are read whole", fix="split the file")


def looks_like_hub_id(path: Path, name: str) -> bool:
    """Whether a name that is no file here has the form owner/name; where a folder `owner` exists, a file was meant."""
    owner = name.partition("/")[0]
    form = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and path.suffix not in (*KINDS, ".gz")
    return bool(form) and not (os.path.isdir(path.parent) or owner in (".", ".."))


def _missing(path: Path, name: str) -> DataError:
    if path.is_symlink():
        target = os.readlink(path)
        return DataError(24, f"is a link to '{target}', which does not exist", where=name, fix="repair the link")
    if re.match(r"\w+://", name):
        return DataError(21, "web addresses are not read", where=name, fix="download the file and name it here")
    if name == "both":
        fix = "name it in data.train_file of a run, or name one of the two here"
        return DataError(21, "'both' stands for alpaca and daily_dialog mixed, and is no single set of rows", fix=fix)
    near = nearest(path.name, [*_entries(path.parent), *NAMED_SETS], 3)
    sample = [f"sample:{name}"] if name in sample_names() else []
    guess = f"did you mean {' or '.join(sample + near)}? " if sample or near else ""
    if re.fullmatch(r"[\w-]+", name):
        problem = f"'{name}' is no file here and no data set known by name"
        known = f"{', '.join(NAMED_SETS)}, {samples_in_words()}"
        return DataError(21, problem, fix=f"{guess}give a local file, a hub dataset as owner/name, or one of {known}")
    if not os.path.isdir(path.parent):
        return DataError(20, f"the folder '{path.parent}' does not exist", where=name, fix="check the path")
    return DataError(20, "there is no such file", where=name, fix=guess.strip() or "check the path")


def _entries(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for _, entry in zip(range(1000), entries, strict=False))
    except OSError:
        return []


def gunzip(raw: bytes, name: str) -> bytes:
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


def decode(raw: bytes, name: str) -> str:
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
        guess = _narrow_guess(raw, error.start)
        problem = f"is not UTF-8: byte 0x{raw[error.start]:02X} at offset {error.start}, line {line}, column {column}"
        raise _wrong_encoding(name, f"{problem}; it looks like {guess}" if guess else problem, guess) from None
    nul = text.find("\0")
    if nul >= 0:
        line, column = line_and_column(text, nul)
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


def _narrow_guess(raw: bytes, fault: int) -> str:
    """The likeliest encoding of the text around the byte that is no UTF-8; nothing where none fits."""
    from charset_normalizer import from_bytes

    start = raw.rfind(b"\n", 0, max(0, fault - 1000)) + 1
    end = raw.find(b"\n", fault + 20_000)
    found = from_bytes(raw[start : end if end > 0 else fault + 200_000], cp_isolation=ENCODINGS)
    best = found.best()
    if best is None:
        return ""
    # Of encodings that fit as well, or give the same text, the most usual one is named.
    equal = [one for one in found if one.chaos <= best.chaos and one.coherence >= best.coherence]
    fitting = {name for one in equal for name in one.could_be_from_charset}
    coding = next(name for name in ENCODINGS if name in fitting)
    return coding.upper().replace("CP125", "Windows-125").replace("_", "-")


def _wrong_encoding(name: str, problem: str, coding: str) -> DataError:
    asked = f"'{name}'" if not name.endswith(".gz") else f"<(zcat '{name}')"
    known = coding.upper() or "ITS-ENCODING"
    return DataError(28, problem, where=name, fix=f"iconv -f {known} -t UTF-8 {asked} > new-file")


def refuse_long_lines(raw: bytes, name: str) -> None:
    """DataError 67 if a line is longer than LINE_LIMIT; looks at one place in 64 MB only."""
    start = 0
    while len(raw) - start > LINE_LIMIT:
        end = raw.rfind(b"\n", start, start + LINE_LIMIT + 1)
        if end < 0:
            end = raw.find(b"\n", start)
            size = ((end if end >= 0 else len(raw)) - start) / 1024**2
            line = raw.count(b"\n", 0, start) + 1
            problem = f"is {size:.0f} MB long; the limit of one line is {LINE_LIMIT >> 20} MB"
            raise DataError(67, problem, where=f"{name} line {line}", fix="split this row into several, or remove it")
        start = end + 1


def _line_and_column_of_byte(raw: bytes, offset: int) -> tuple[int, int]:
    return raw.count(b"\n", 0, offset) + 1, offset - raw.rfind(b"\n", 0, offset)


def line_and_column(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
