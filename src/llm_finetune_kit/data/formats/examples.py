"""All rows of a source as examples; what cannot be used is named with its place, and nothing is lost in silence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_finetune_kit.data.formats.rows import Example, Fault, Message, Notes, Row, Skipped
from llm_finetune_kit.data.formats.slots import Detected
from llm_finetune_kit.data.formats.threads import Threads
from llm_finetune_kit.data.sources import Source
from llm_finetune_kit.errors import DataError

LISTED = 10  # faults that an error lists one by one
View = dict[str, str]  # slot -> column


@dataclass(frozen=True)
class Formatted:
    """Examples ready for a template; what was left out (row index and reason); what the user should know."""

    examples: list[Example]
    dropped: list[tuple[int, str]]
    warnings: list[str]


class Views:
    """The columns of rows by the names of the slots, found once for each set of columns."""

    def __init__(self, detected: Detected) -> None:
        self.detected = detected
        self.known: dict[tuple[str, ...], View | Fault] = {}

    def of(self, row: Row) -> View:
        columns = tuple(row)
        found = self.known.get(columns)
        if found is None:
            try:
                found = self.detected.view(columns)
            except Fault as fault:
                found = fault
            self.known[columns] = found
        if isinstance(found, Fault):
            raise found
        return found

    def __call__(self, row: Row) -> Row:
        return {slot: row[column] for slot, column in self.of(row).items()}

    def in_columns(self, row: Row, fault: Fault) -> Fault:
        """The fault with the file's own column name instead of the slot's."""
        view = self.known.get(tuple(row), {})
        end = next((at for at, mark in enumerate(fault.place) if mark in ".["), len(fault.place))
        slot = fault.place[:end]
        column = slot if isinstance(view, Fault) else view.get(slot, slot)
        return Fault(fault.number, column + fault.place[end:], fault.problem)


def to_examples(
    source: Source,
    detected: Detected,
    *,
    on_bad_rows: Literal["stop", "drop"],
    system_prompt: str | None,
    threads: Threads = "best",
) -> Formatted:
    """Every row as an example. Faulty rows stop the run or are dropped; rows without an answer are counted.

    Raises DataError with the first fault and a list of the others, or 10 if nothing is left.
    """
    notes: Notes = Counter()
    views = Views(detected)
    examples: list[Example] = []
    faults: list[tuple[int, Fault]] = []
    skipped: list[tuple[int, str]] = []
    for index, made in _outcomes(source.rows, detected, views, threads, notes):
        if isinstance(made, Example):
            made.row = index
            if system_prompt and made.messages and made.messages[0]["role"] != "system":
                made.messages = [_system(system_prompt), *made.messages]
            examples.append(made)
        elif isinstance(made, Fault):
            faults.append((index, made))
        else:
            skipped.append((index, str(made)))
    faults = sorted(((index, views.in_columns(source.rows[index], fault)) for index, fault in faults), key=lambda f: f[0])
    if faults and on_bad_rows == "stop":
        raise _bad_rows(source, faults)
    dropped = sorted([*skipped, *((index, str(fault)) for index, fault in faults)])
    if not examples:
        raise _nothing_left(source, dropped)
    return Formatted(examples, dropped, _warnings(source, notes, skipped, faults))


def _outcomes(
    rows: Sequence[Row], detected: Detected, views: Views, threads: Threads, notes: Notes
) -> Iterator[tuple[int, Example | Fault | Skipped]]:
    if detected.format.gather is not None:
        yield from detected.format.gather(rows, views, threads, notes)
    convert = detected.format.convert
    if convert is None:
        return
    for index, row in enumerate(rows):
        try:
            yield index, convert({slot: row[column] for slot, column in views.of(row).items()}, notes)
        except (Fault, Skipped) as reason:
            yield index, reason


def _system(prompt: str) -> Message:
    return {"role": "system", "content": prompt}


# --- in words ----------------------------------------------------------------------------------------------


def _bad_rows(source: Source, faults: Sequence[tuple[int, Fault]]) -> DataError:
    """The first fault as the error, and of the others up to ten with how many there are of each kind."""
    index, fault = faults[0]
    others = faults[1:]
    more = f"{len(others):,} more rows have faults" if len(others) > 1 else "1 more row has a fault"
    why = f"{more} ({source.spots([other for other, _ in others])})" if others else ""
    kinds = Counter(_kind(each) for _, each in faults)
    if len(kinds) > 1:
        counts = "".join(f"\n        {count:,} x {kind}" for kind, count in kinds.most_common(LISTED))
        listed = "".join(f"\n        {_where(source, *each)}: {each[1].problem}" for each in others[: LISTED - 1])
        why = f"{len(faults):,} rows have faults:{counts}\n        the next ones:{listed}"
    fix = "correct the row, or set data.on_bad_rows=drop to train without it"
    return DataError(fault.number, fault.problem, where=_where(source, index, fault), why=why, fix=fix)


def _kind(fault: Fault) -> str:
    """The fault without what differs from row to row."""
    place = re.sub(r"\[\d+\]", "[...]", fault.place)
    problem = re.sub(r"'[^']*'", "'...'", fault.problem)
    return f"{place}: {problem}" if place else problem


def _where(source: Source, index: int, fault: Fault) -> str:
    return f"{source.place(index)}, field {fault.place}" if fault.place else source.place(index)


def _nothing_left(source: Source, dropped: list[tuple[int, str]]) -> DataError:
    common = Counter(reason for _, reason in dropped).most_common(3)
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in common)
    fix = "correct the rows, or check that data.format and the columns are the right ones"
    return DataError(10, f"none of {len(source.rows):,} rows can be used", where=source.name, why=reasons, fix=fix)


def _warnings(source: Source, notes: Notes, skipped: list[tuple[int, str]], faults: list[tuple[int, Fault]]) -> list[str]:
    said = []
    for reason in sorted({reason for _, reason in skipped}):
        rows = [index for index, why in skipped if why == reason]
        said.append(f"{_rows(len(rows))} left out for an {reason} ({source.spots(rows)})")
    if faults:
        rows = [index for index, _ in faults]
        said.append(f"{_rows(len(rows))} left out for faults ({source.spots(rows)}); the first: {faults[0][1]}")
    return said + [f"{_rows(count)}: they {note}" for note, count in notes.items() if count]


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count > 1 else ''}"
