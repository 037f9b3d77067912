"""Where rows come from: files, folders, samples, hub datasets and Python values, read whole and checked.

Files hold a JSON list, JSON lines, CSV, TSV, Parquet, Arrow or plain text, each also gzipped; the content decides
which, and the name only where the content leaves it open. What a user may write is told in spec.py.
"""

# Faults of this module and of files.py, contents.py, json_*.py and table_rows.py (formats.py has 1 to 19):
#
#   20  no such file                   28  not UTF-8                    35  NaN, Infinity, too large a number
#   21  unknown name or web address    29  NUL bytes                    36  lone surrogate
#   22  folder without a data file     30  damaged gzip                 37  nested too deep
#   23  not a regular file             31  binary kind that is not read 38  not a list of objects
#   24  broken link                    32  kind cannot be told          39  structure of a table
#   25  no permission, or unreadable   33  broken JSON                  40  unknown sample
#   26  too large                      34  duplicate key                41  rows in Python that JSON cannot hold
#   27  empty                          67  a line is too long           68  the name has parts that mean nothing here
#
#   60, 61 spec.py      62, 63 folders.py      64 to 66 columnar.py      70 to 76 hub_rows.py

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_finetune_kit.data.sources.contents import columnar_rows, text_in, text_rows
from llm_finetune_kit.data.sources.files import (
    LISTED,
    decode,
    gunzip,
    looks_like_hub_id,
    read_file,
    sample_names,
    samples_in_words,
)
from llm_finetune_kit.data.sources.folders import files_of, part_beside
from llm_finetune_kit.data.sources.json_rows import lines_of_rows
from llm_finetune_kit.data.sources.python_rows import part_to_hold_out, rows_of
from llm_finetune_kit.data.sources.spec import FORM, Spec, parse
from llm_finetune_kit.errors import DataError, nearest

if TYPE_CHECKING:
    from llm_finetune_kit.data.sources.hub_rows import Licence

COUNTED = ("json", "parquet", "arrow", "hub")  # kinds whose rows have numbers instead of lines
DIALOG_FILES = ("dialogues_text.txt", "dialogues_text.txt.gz", "daily_dialog")
LOCAL_NAMES = {  # data sets with a name of their own, and what they are called where they were downloaded
    "alpaca": ("alpaca_data.json", "alpaca_data.json.gz"),
    "daily_dialog": DIALOG_FILES,
    "dailydialog": DIALOG_FILES,
}


@dataclass(frozen=True, eq=False)
class Source:
    """Rows, and where each one came from."""

    name: str
    rows: list[dict[str, Any]]
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    kind: str = "rows"
    lines: Sequence[int] = ()  # line of each row, or its number from 1 where rows have no lines; () for 1, 2, 3...
    reread: Callable[[], str] | None = field(default=None, repr=False)
    licence: Licence | None = None
    shards: tuple[tuple[int, Source], ...] = field(default=(), repr=False)  # of several files: first row, and its places
    broken: dict[str, str] = field(default_factory=dict)  # places that could not be read and were left out, and why

    def place(self, index: int) -> str:
        """Row `index` as a person finds it: `train.jsonl line 1287`, `data.json row 12 (line 61)`, `rows[3]`."""
        number = self._number(index)
        if self.shards:
            first, shard = self.shards[bisect_right(self.shards, number - 1, key=lambda shard: shard[0]) - 1]
            return shard.place(number - 1 - first)
        if self.kind == "rows":
            return f"rows[{number - 1}]"
        if self.kind not in COUNTED:
            return f"{self.name} line {number}"
        line = f" (line {self._list_lines[number - 1]})" if number <= len(self._list_lines) else ""
        return f"{self.name} row {number}{line}"

    def spots(self, indices: Sequence[int]) -> str:
        """Several rows in short, at most ten: `lines 1290, 1302`."""
        more = ", ..." if len(indices) > LISTED else ""
        if self.shards or self.kind == "rows":
            return ", ".join(self.place(index) for index in indices[:LISTED]) + more
        word = ("row" if self.kind in COUNTED else "line") + ("s" if len(indices) > 1 else "")
        return f"{word} {', '.join(str(self._number(index)) for index in indices[:LISTED])}{more}"

    def only(self, chosen: Sequence[int]) -> Source:
        """The rows `chosen` alone, which keep their places."""
        if len(chosen) == len(self.rows):
            return self
        rows = [self.rows[index] for index in chosen]
        lines = array("L", (self._number(index) for index in chosen))
        digest = hashlib.sha256(f"{self.fingerprint} {list(chosen)}".encode()).hexdigest()
        return replace(self, rows=rows, lines=lines, fingerprint=digest)

    def _number(self, index: int) -> int:
        return self.lines[index] if self.lines else index + 1

    @cached_property
    def _list_lines(self) -> list[int]:
        """Line of each row of the JSON list, read anew; nothing if the file is no longer the same."""
        try:
            text = self.reread() if self.reread else ""
            return lines_of_rows(text) if text else []
        except (DataError, OSError, ValueError):
            return []


def read_source(spec: Any, *, base: Path | None = None, seed: int = 42, drop: bool = False) -> Source:
    """The rows that `spec` names (see spec.py; files are looked up in `base`), or that it holds as a Python value.

    `seed` decides which rows `#N` takes. With `drop`, lines that are no rows are left out and listed in `broken`.
    Raises DataError, and MachineError where the hub cannot be reached.
    """
    if not isinstance(spec, str | Path):
        rows, canonical, notes = rows_of(spec)
        return Source("rows", rows, hashlib.sha256(canonical.encode()).hexdigest(), notes)
    asked = _parsed(spec, base)
    found = _found(asked, base)
    if found is None:
        from llm_finetune_kit.data.sources.hub_rows import read_hub

        hub = read_hub(asked, seed)
        return Source(hub.name, hub.rows, hub.fingerprint, hub.notes, "hub", hub.numbers, licence=hub.licence)
    source = _read_local(asked, found, base, drop)
    chosen = asked.choose(len(source.rows), seed)
    said = asked.said(len(chosen), len(source.rows), seed)
    return replace(source.only(chosen), notes=[*source.notes, *said])


def held_out_beside(spec: Any, *, base: Path | None = None) -> Any | None:
    """The validation (else test) part beside a training part, as a spec or, of a DatasetDict, as a value.

    None where there is none: for a file, and where the spec names another part than the training part.
    """
    if not isinstance(spec, str | Path):
        return part_to_hold_out(spec)
    asked = _parsed(spec, base)
    found = _found(asked, base)
    if found is None:
        from llm_finetune_kit.data.sources.hub_rows import hub_part_beside

        return hub_part_beside(asked)
    if asked.base.startswith("sample:") or not os.path.isdir(found):
        return None
    part = part_beside(found, asked.parts[0] if asked.parts else None)
    return f"{asked.base}:{part}" if part else None


def _parsed(spec: str | Path, base: Path | None) -> Spec:
    if not str(spec).strip():
        fix = f"give a local file or folder, a hub dataset as owner/name, or one of {samples_in_words()}"
        raise DataError(20, "no data file is named", fix=fix)
    return parse(str(spec), lambda name: bool(name) and os.path.lexists(_path(name, base)))


def _path(name: str, base: Path | None) -> Path:
    return Path(base or "") / os.path.expanduser(name)


def _found(asked: Spec, base: Path | None) -> Path | None:
    """The local file, folder or (for an error) path that is meant; None for what the hub has."""
    path = _path(asked.base, base)
    if os.path.lexists(path) or asked.base.startswith("sample:"):
        return path
    if asked.base in LOCAL_NAMES:
        places = [_path(f"{folder}{name}", base) for folder in ("", "data/") for name in LOCAL_NAMES[asked.base]]
        return next((place for place in places if os.path.exists(place)), None)
    return None if looks_like_hub_id(path, asked.base) else path


# --- files, folders and samples ----------------------------------------------------------------------------


def _read_local(asked: Spec, path: Path, base: Path | None, drop: bool) -> Source:
    if asked.base.startswith("sample:"):
        _refuse_parts(asked)
        return _from_sample(asked.base)
    if asked.base in LOCAL_NAMES and path != _path(asked.base, base):  # the set is here under another name
        from llm_finetune_kit.data.sources.hub_rows import licence_of

        source = _read_local(replace(asked, base=str(path)), path, base, drop)
        return replace(source, notes=[f"{asked.base} is read from {path}", *source.notes], licence=licence_of(asked.base))
    if not os.path.isdir(path):
        _refuse_parts(asked)
        return _from_bytes(asked.base, path.name, lambda: read_file(path, asked.base), drop)
    if len(asked.parts) > 1:
        raise DataError(68, f"a folder has no config ('{asked.parts[0]}')", where=asked.text, fix="name it as folder:split")
    files = files_of(path, asked.base, asked.parts[0] if asked.parts else None)
    names = [f"{asked.base.rstrip('/')}/{file.relative_to(path).as_posix()}" for file in files]
    return _joined(asked.base, [_from_file(file, name, drop) for file, name in zip(files, names, strict=True)])


def _from_file(path: Path, name: str, drop: bool) -> Source:
    return _from_bytes(name, path.name, lambda: read_file(path, name), drop)


def _refuse_parts(asked: Spec) -> None:
    if asked.parts:
        problem = f"'{asked.base}' has no part '{':'.join(asked.parts)}': only folders and hub datasets have parts"
        raise DataError(68, problem, where=asked.text, fix=f"write {FORM}")


def _joined(name: str, sources: list[Source]) -> Source:
    """Several files as one source, in their order."""
    if len(sources) == 1:
        return sources[0]
    rows = [row for source in sources for row in source.rows]
    digest = hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()
    files = ", ".join(Path(source.name).name for source in sources[:LISTED]) + (", ..." if len(sources) > LISTED else "")
    notes = [f"{name}: {len(sources)} files are read as one: {files}", *(note for source in sources for note in source.notes)]
    firsts = accumulate((len(source.rows) for source in sources), initial=0)
    shards = tuple((first, replace(source, rows=[])) for first, source in zip(firsts, sources, strict=False))
    broken = {place: why for source in sources for place, why in source.broken.items()}
    return Source(name, rows, digest, notes, "files", shards=shards, broken=broken)


def _from_sample(name: str) -> Source:
    from importlib.resources import files

    short = name.removeprefix("sample:")
    if short not in sample_names():
        near = nearest(short, sample_names())
        guess = f"did you mean sample:{near[0]}? " if near else ""
        raise DataError(40, f"there is no sample '{short}'", fix=f"{guess}known: {samples_in_words()}")
    sample = files("llm_finetune_kit") / "assets" / "samples" / f"{short}.json"
    return _from_bytes(name, f"{short}.json", sample.read_bytes)


def _from_bytes(name: str, file_name: str, read: Callable[[], bytes], drop: bool = False) -> Source:
    raw = read()
    fingerprint = hashlib.sha256(raw).hexdigest()
    raw = gunzip(raw, name)
    if columnar := columnar_rows(raw, file_name, name):
        kind, rows, notes = columnar
        return Source(name, rows, fingerprint, notes, kind)
    text = text_in(raw, file_name, name)
    del raw  # memory: the rows are made from the text alone
    broken: dict[int, str] = {}
    kind, rows, lines, notes = text_rows(text, file_name, name, broken if drop else None)

    def reread() -> str:
        again = read()
        same = hashlib.sha256(again).hexdigest() == fingerprint
        return decode(gunzip(again, name), name) if same else ""

    left_out = {f"{name} line {line}": why for line, why in sorted(broken.items())}
    return Source(name, rows, fingerprint, notes, kind, lines, reread if kind == "json" else None, broken=left_out)
