"""Which column of a row fills which slot of a format: by the known names, or by the names the user gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from llm_finetune_kit.data.formats.rows import Fault
from llm_finetune_kit.data.formats.shapes import Format
from llm_finetune_kit.errors import nearest

Names = dict[str, str]  # the lower-case name, or the one the user gave, of each column


@dataclass(frozen=True)
class Detected:
    """The format of a source, and how it was told. `columns` are the user's own: slot -> column of the file."""

    format: Format
    why: str
    columns: Mapping[str, str] = field(default_factory=dict)
    asked: bool = False

    def view(self, columns: Sequence[str]) -> dict[str, str]:
        """The column of each slot, for rows with these columns. Raises Fault if one that is due is not there."""
        names = named(columns, self.columns)
        used = filled(self.format, names, self.columns)
        for slot, known in self.format.needs.items():
            if slot not in used:
                due = self.columns.get(slot, known[0])
                near = nearest(due.lower(), [name for name in names if names[name] not in used.values()])
                guess = f", did you mean '{names[near[0]]}'?" if near else ""
                found = ", ".join(columns[:20]) or "no columns"
                raise Fault(3, due, f"is missing (the row has {found}){guess}")
        wrong = None if self.asked else misspelt(self.format, used, names)
        if wrong:
            raise Fault(3, wrong[0], f"would not be used: did you mean '{wrong[1]}'?")
        return used


def named(columns: Sequence[str], renamed: Mapping[str, str]) -> Names:
    """The names that columns go by; a column the user named loses its own name, and the first of two alike wins."""
    meant = set(renamed.values())
    names = {column.lower(): column for column in reversed(columns) if column not in meant}
    return names | {slot: column for slot, column in renamed.items() if column in columns}


def filled(shape: Format, names: Names, renamed: Mapping[str, str]) -> dict[str, str]:
    """The column of each slot that has one; a column fills one slot only, and the user's names go first."""
    used: dict[str, str] = {}
    for slot, known in (*shape.needs.items(), *shape.takes.items()):
        own = [name for name in (slot, *known) if name in renamed]
        column = next((names[name] for name in (*own, *known) if name in names and names[name] not in used.values()), None)
        if column is not None:
            used[slot] = column
    return used


def misspelt(shape: Format, used: dict[str, str], names: Names) -> tuple[str, str] | None:
    """A column such as 'inputs' or 'instructon' that would be left out in silence, and the name it was meant to have."""
    hoped = [name for slot, known in shape.takes.items() if slot not in used for name in known]
    hoped += ["instruction"] if shape.name == "pairs" else []
    for name, column in names.items():
        near = get_close_matches(name, hoped, n=1, cutoff=0.88) if column not in used.values() else []
        if near:
            return column, near[0]
    return None
