"""Files that a browser sends: kept only if their content is data, under a name that is made here, within limits."""

from __future__ import annotations

import filecmp
import gzip
import re
import shutil
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

from llm_finetune_kit.errors import UsageError
from llm_finetune_kit.report.words import size
from llm_finetune_kit.ui.workspace import HERE, Workspace

FILE_LIMIT = 200_000_000  # bytes of one upload
TOTAL_LIMIT = 2_000_000_000  # bytes of all uploads of a workspace
MOST_FILES = 1_000
PART = 1 << 20  # bytes that are read at once, and that a request may have beside its file
KNOWN = "JSON, JSON lines, CSV, TSV, Parquet and plain text"
JSON_NAMES, TABLE_NAMES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv", ".tab", ".txt", ".text", ".md")
CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
MARKUP = re.compile(rb"\s*<(!doctype|\?xml|html|head|body|script|svg|!--)|#!", re.IGNORECASE)
PARQUET = b"PAR1"
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Limits:
    """How large one file, and all of them, may be in bytes, and how many there may be."""

    file: int = FILE_LIMIT
    total: int = TOTAL_LIMIT
    files: int = MOST_FILES


def used(workspace: Workspace) -> tuple[int, int]:
    """Bytes and number of the files that were uploaded into a workspace."""
    sizes = [path.stat().st_size for path in workspace.uploads.glob("*") if path.is_file()]
    return sum(sizes), len(sizes)


def arriving(workspace: Workspace) -> int:
    """Bytes that lie where uploads arrive."""
    return sum(path.stat().st_size for path in workspace.incoming.rglob("*") if path.is_file())


def take(workspace: Workspace, arrived: Path, name: str, limits: Limits = Limits()) -> str:
    """Move an upload into the workspace and return its name there, such as `uploads/train.jsonl`.

    What is gzipped is kept unpacked, and the limits hold for what was inside. The same content under the same name is
    kept once. Raises UsageError for what is too large or no data; the file
    that arrived is gone either way. What lies elsewhere than where uploads arrive is not touched.
    """
    if not arrived.resolve().is_relative_to(workspace.incoming):
        raise UsageError(51, "this is no upload", fix="send the file again")
    unpacked = arrived.with_name(f"{arrived.name}.unpacked")
    try:
        if _is_gzip(arrived):
            _unpack(arrived, unpacked, limits.file)
            arrived.unlink()
            arrived, name = unpacked, re.sub(r"\.gz(ip)?$", "", name, flags=re.IGNORECASE)
        count = arrived.stat().st_size
        bytes_used, files = used(workspace)
        if count > limits.file:
            why = f"one file may have {size(limits.file)}"
            raise UsageError(52, f"the file has {size(count)}", why=why, fix=f"upload a part of it, or put it {HERE}")
        if bytes_used + count > limits.total or files >= limits.files:
            held = f"{files:,} files with {size(bytes_used)} are there; the limits are {limits.files:,} and {size(limits.total)}"
            raise UsageError(52, "there is no room for another upload", why=held, fix="delete files from the folder uploads")
        suffix = kind_of(arrived, Path(name.lower()).suffix)
        workspace.uploads.mkdir(exist_ok=True)
        return _put(workspace, arrived, slug(Path(name).stem) or "data", suffix)
    finally:
        for path in (arrived, unpacked):
            path.unlink(missing_ok=True)


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP


def _unpack(packed: Path, target: Path, most: int) -> None:
    """Unpack piece by piece and stop at `most` bytes, however much a small file would grow to. Raises UsageError."""
    count = 0
    try:
        with gzip.open(packed, "rb") as source, open(target, "wb") as file:
            while part := source.read(PART):
                count += len(part)
                if count > most:
                    why = f"one file may have {size(most)}, counted unpacked"
                    raise UsageError(52, f"the unpacked file has more than {size(most)}", why=why, fix=f"put it {HERE}")
                file.write(part)
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        fix = "unpack it first, or write it anew with gzip"
        raise UsageError(53, "this gzip file is damaged", why=str(error), fix=fix) from None


def kind_of(path: Path, suffix: str) -> str:
    """The ending that a file gets for what it holds; its own name decides only between kinds of text. Raises UsageError."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read(4)
    if start.startswith(PARQUET) and end == PARQUET:
        return ".parquet"
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    strange = MARKUP.match(start.removeprefix(b"\xef\xbb\xbf")) or CONTROLS.search(start[:512]) or not _is_text(path)
    if not first or strange:
        raise UsageError(
            53, "this file holds no training data" if first else "this file is empty", fix=f"{KNOWN} are read, as UTF-8"
        )
    if first == b"{" and suffix not in TABLE_NAMES:
        return ".jsonl"
    if first == b"[" and suffix not in TABLE_NAMES:
        return ".json"
    if suffix in TABLE_NAMES:
        return suffix
    why = f"its name ends in {suffix}, and it is no JSON" if suffix in JSON_NAMES else "neither its content nor its name tells"
    raise UsageError(53, "it cannot be told what this file holds", why=why, fix=f"{KNOWN} are read; name it by what it holds")


def slug(text: str, longest: int = 48) -> str:
    """A name of the letters a-z, digits and dashes alone, made of any text; empty where nothing is left of it."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:longest].strip("-")


def _put(workspace: Workspace, arrived: Path, stem: str, suffix: str) -> str:
    for number in range(1, 10_000):
        target = workspace.uploads / f"{stem if number == 1 else f'{stem}-{number}'}{suffix}"
        if not target.exists():
            shutil.move(arrived, target)
            target.chmod(0o600)
            return str(target.relative_to(workspace.root))
        if filecmp.cmp(arrived, target, shallow=False):
            return str(target.relative_to(workspace.root))
    raise UsageError(52, "there are too many uploads of this name", fix="name the file otherwise")


def _is_text(path: Path) -> bool:
    """Whether the whole file is UTF-8 without NUL bytes."""
    try:
        with open(path, encoding="utf-8") as file:
            return all("\0" not in part for part in iter(lambda: file.read(PART), ""))
    except UnicodeDecodeError:
        return False
