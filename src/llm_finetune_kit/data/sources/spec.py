"""How a user names a set of rows in one line of text.

    BASE[:CONFIG][:SPLIT][[a:b]][#N]

    train.jsonl            a file               owner/name               a hub dataset, its training split
    train.jsonl#500        500 of its rows      owner/name:config:test   one configuration, another split
    train.jsonl[:90%]      its first 90 %       owner/name:train[:10%]   a tenth of a split
    folder:test            test files of it     sample:chat[5:10]#3      3 of five rows of a sample

`[a:b]` is a slice like Python's: bounds are row numbers from 0 or percent, negative ones count from the end, and
either may be left out. `#N` then takes N rows by the seed, in the order of the file. A file or folder that is really
called `a#1.json`, `a:b` or `a[1:2].txt` is found by that name first; `C:` before a slash is a Windows drive.
"""

# Faults of this module:
#
#   60  not of this form          61  the slice holds no row

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_finetune_kit.errors import DataError

FORM = "NAME[:CONFIG][:SPLIT][[a:b]][#N], such as train.jsonl#500, folder:test or owner/name:train[:10%]"
TAKE = re.compile(r"#([^#/\\\[\]]*)$")
SLICE = re.compile(r"\[([^\[\]]*)\]$")
BOUND = re.compile(r"(-?\d[\d_]*)(%?)")
PART = re.compile(r":([^:/\\]*)$")


@dataclass(frozen=True)
class Bound:
    """One end of a slice: a row number from 0, or percent of all rows; negative ones count from the end."""

    value: int
    percent: bool

    def row(self, count: int) -> int:
        """The row it falls on, of `count` rows; percent are rounded to the nearest row, as `datasets` does."""
        row = round(self.value * count / 100) if self.percent else self.value
        return min(count, max(0, row + count if self.value < 0 else row))


@dataclass(frozen=True)
class Spec:
    """A named set of rows, taken apart. `parts` are what stands between colons: config and split, or one of them."""

    text: str
    base: str
    parts: tuple[str, ...] = ()
    start: Bound | None = None
    stop: Bound | None = None
    take: int | None = None

    def choose(self, count: int, seed: int) -> Sequence[int]:
        """The numbers (from 0, rising) of the rows that are meant, of `count`. DataError if the slice holds none."""
        first = self.start.row(count) if self.start else 0
        last = self.stop.row(count) if self.stop else count
        if last <= first:
            problem = f"the slice holds no row: rows {first:,} to {last:,} of {count:,}"
            raise DataError(61, problem, where=self.text, fix="write a wider slice, such as [:10%] or [0:100]")
        if self.take is None or self.take >= last - first:
            return range(first, last)
        import numpy as np

        drawn = np.random.Generator(np.random.PCG64(seed)).choice(last - first, self.take, replace=False)
        return array("L", (int(number) + first for number in np.sort(drawn)))

    def said(self, chosen: int, count: int, seed: int) -> list[str]:
        """What to tell the user about the choice; nothing if all rows are used and no number was asked for."""
        sliced = f" of the slice of {self.base}" if self.start or self.stop else f" of {self.base}"
        if self.take is not None and self.take > chosen:
            return [f"{self.take:,} rows were asked for; all {chosen:,}{sliced} are used"]
        if chosen == count:
            return []
        how = f", chosen by seed {seed}" if self.take is not None else ""
        return [f"{chosen:,} of {count:,} rows of {self.base}{how}"]


def parse(text: str, exists: Callable[[str], bool]) -> Spec:
    """The parts of `text`; what `exists` as a file or folder is a name as it stands. DataError if it is malformed."""
    rest, take, parts = text, None, list[str]()
    bounds: tuple[Bound | None, Bound | None] = (None, None)
    if "://" in text:  # an address is told as such, whole
        return Spec(text, text)
    if not exists(rest) and (found := TAKE.search(rest)):
        take, rest = _number(found[1], text), rest[: found.start()]
    if not exists(rest) and (found := SLICE.search(rest)):
        bounds, rest = _bounds(found[1], text), rest[: found.start()]
    head = len("sample:") if rest.startswith("sample:") else 0
    while not exists(rest) and (found := PART.search(rest, head)):
        parts.insert(0, found[1])
        rest = rest[: found.start()]
    if "" in parts:
        raise _malformed(text, "nothing stands after a colon")
    if len(parts) > 2:
        raise _malformed(text, f"{len(parts)} parts after '{rest}' (at most a config and a split)")
    if not rest:
        raise _malformed(text, "it begins with no name")
    return Spec(text, rest, tuple(parts), *bounds, take)


def _number(digits: str, text: str) -> int:
    number = digits.replace("_", "")
    if not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise _malformed(text, f"'#{digits}' is no number of rows")
    return int(number)


def _bounds(inside: str, text: str) -> tuple[Bound | None, Bound | None]:
    ends = [end.strip() for end in inside.split(":")]
    found = [BOUND.fullmatch(end) for end in ends]
    if len(ends) != 2 or any(end and not match for end, match in zip(ends, found, strict=True)):
        raise _malformed(text, f"'[{inside}]' is no slice")
    start, stop = (Bound(int(match[1]), bool(match[2])) if match else None for match in found)
    if start and stop and start.percent != stop.percent:
        raise _malformed(text, f"'[{inside}]' mixes rows and percent")
    if any(bound and bound.percent and abs(bound.value) > 100 for bound in (start, stop)):
        raise _malformed(text, f"'[{inside}]' has more than 100 %")
    return start, stop


def _malformed(text: str, problem: str) -> DataError:
    return DataError(60, f"cannot be understood: {problem}", where=text, fix=f"write {FORM}")
