"""From rows of any known shape to one shape: messages, plain text, or a preference.

The shapes are the rows of the table in shapes.py; what cannot be trained as it is meant becomes a fault with its place.
"""

# Faults of the formats (sources.py has 20 and above):
#
#   1  columns of no known format      5  not text                       9  blank text in the middle
#   2  unknown format name             6  unknown role                  10  nothing is left to train on
#   3  column missing in one row       7  order of roles                11  preference data
#   4  null where text is due          8  no answer in a conversation
#
#  80  no function call               84  reply without its parent      88  conversion that would lose too much
#  81  no list of functions           85  replies in a circle           89  unknown shape or file ending to write
#  82  cell without the due JSON      86  message id given twice        90  file to write exists
#  83  data.columns names nothing     87  no two answers to compare     91  file cannot be written

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from llm_finetune_kit.data.formats.examples import Formatted, to_examples
from llm_finetune_kit.data.formats.rows import Example, Row
from llm_finetune_kit.data.formats.shapes import ALSO_CALLED, EXPECTED, FORMATS, SLOTS, Format, shapes_in_words
from llm_finetune_kit.data.formats.slots import Detected, filled, misspelt, named
from llm_finetune_kit.data.sources import Source
from llm_finetune_kit.errors import DataError, nearest

__all__ = ["FORMATS", "Detected", "Example", "Format", "Formatted", "detect", "refuse_untrainable", "to_examples"]


def detect(source: Source, asked: str | None, columns: Mapping[str, str] | None = None) -> Detected:
    """The format of the rows, from the columns of the first one; every row is held to it by `to_examples`.

    `columns` says which column of the file is meant where its name is not a known one: {"prompt": "frage"}.
    Raises DataError 1 (no known format), 2 (format unknown) or 83 (`columns` names what is not there).
    """
    own = tuple(source.rows[0])
    renamed = _checked(source, own, columns or {})
    names = named(own, renamed)
    if asked is not None:
        return _as_asked(source, asked, names, renamed)
    for shape in FORMATS:
        used = filled(shape, names, renamed)
        if set(renamed.values()) <= set(used.values()) and _proves(shape, used, source):
            _refuse_misspelt(shape, used, names, source)
            return Detected(shape, _why(shape, used, renamed, own), renamed)
    if renamed:
        raise _no_shape_takes(source, renamed, own)
    raise _unknown(source, list(own))


def refuse_untrainable(detected: Detected, source: Source) -> None:
    """Chosen and rejected answers must not be learned as if all of them were good: raises DataError 11."""
    if detected.format.kind not in ("preference", "rated"):
        return
    why = "half of its answers are examples of what not to say"
    keep = "the chosen" if detected.format.kind == "preference" else "the well rated"
    fix = (
        f"keep {keep} answers only: finetune data convert {source.name} --to messages --out good.jsonl; "
        "or set data.format to train on the rows as they are"
    )
    raise DataError(11, f"preference data ({detected.why}) is not trained yet", where=source.name, why=why, fix=fix)


def _why(shape: Format, used: dict[str, str], renamed: Mapping[str, str], columns: tuple[str, ...]) -> str:
    """Which columns proved the format and which are not used."""
    meant = {column: slot for slot, column in renamed.items()}
    proof = " + ".join(f"{used[slot]} (as {meant[used[slot]]})" if used[slot] in meant else used[slot] for slot in shape.needs)
    unused = [column for column in columns if column not in used.values()]
    rest = f"; not used: {', '.join(unused[:20])}" + (", ..." if len(unused) > 20 else "") if unused else ""
    return f"found {proof}{rest}"


def _proves(shape: Format, used: dict[str, str], source: Source) -> bool:
    """Whether all needed columns are there and, where that is no proof, their values are of the shape's kind."""
    if any(slot not in used for slot in shape.needs):
        return False
    if shape.shown is None:
        return True
    rows: list[Row] = [{slot: row.get(column) for slot, column in used.items()} for row in islice(source.rows, 1000)]
    said = shape.shown(rows)
    return used[next(iter(shape.needs))].lower() == shape.home if said is None else said


# --- what was asked for ------------------------------------------------------------------------------------


def _checked(source: Source, own: tuple[str, ...], columns: Mapping[str, str]) -> dict[str, str]:
    """The user's names for columns, held against the formats and the file."""
    renamed = {slot.strip().lower(): column for slot, column in columns.items()}
    for slot, column in renamed.items():
        if slot not in SLOTS:
            near = nearest(slot, SLOTS)
            guess = f"did you mean '{near[0]}'? " if near else ""
            fix = f"{guess}known: {', '.join(SLOTS)}"
            raise DataError(83, f"data.columns names '{slot}', which no format has", where=source.name, fix=fix)
        if column not in own:
            near = nearest(column, own)
            guess = f"did you mean '{near[0]}'? " if near else ""
            problem = f"data.columns gives '{column}' for {slot}, and there is no such column"
            raise DataError(83, problem, where=source.place(0), fix=f"{guess}the columns are: {', '.join(own[:20])}")
    return renamed


def _no_shape_takes(source: Source, renamed: Mapping[str, str], own: tuple[str, ...]) -> DataError:
    given = ", ".join(f"{slot}: {column}" for slot, column in renamed.items())
    problem = f"no format has all that data.columns names ({given})"
    fix = f"name every column that is meant; the columns are: {', '.join(own[:20])}; accepted: {shapes_in_words()}"
    return DataError(1, problem, where=source.place(0), fix=fix)


def _as_asked(source: Source, asked: str, names: dict[str, str], renamed: Mapping[str, str]) -> Detected:
    name = asked.strip().lower().replace("_", "-").replace("/", "-")
    meant = ALSO_CALLED.get(name, (name,))
    shapes = [shape for shape in FORMATS if shape.name in meant]
    if not shapes:
        known = [shape.name for shape in FORMATS]
        near = nearest(name, known)
        guess = f"did you mean {near[0]}? " if near else ""
        raise DataError(2, f"there is no format '{asked}'", fix=f"{guess}known: {', '.join(known)}")
    fits = [shape for shape in shapes if shape.needs.keys() <= filled(shape, names, renamed).keys()]
    if fits:
        return Detected(fits[0], "you asked for it", renamed, asked=True)
    shape, used = shapes[0], filled(shapes[0], names, renamed)
    missing = next(known for slot, known in shape.needs.items() if slot not in used)
    problem = f"format {shape.name} needs {shape}, but the columns are: {', '.join(names.values()) or 'none'}"
    fix = f"say which column is meant, as data.columns={{{missing[0]}: COLUMN}}, or leave data.format out to have it detected"
    raise DataError(1, problem, where=source.place(0), fix=fix)


# --- columns of no known format ----------------------------------------------------------------------------


def _refuse_misspelt(shape: Format, used: dict[str, str], names: dict[str, str], source: Source) -> None:
    wrong = misspelt(shape, used, names)
    if wrong:
        column, near = wrong
        fix = f"rename it to '{near}', or set data.format={shape.name} if the column is not meant to be used"
        problem = f"the column '{column}' would not be used: did you mean '{near}'?"
        raise DataError(1, problem, where=source.place(0), fix=fix)


def _unknown(source: Source, columns: list[str]) -> DataError:
    if not columns:
        return DataError(1, "has no columns", where=source.place(0), fix=f"accepted: {shapes_in_words()}")
    near_ones = ((column, near) for column in columns for near in nearest(column.lower(), EXPECTED))
    guesses = [(column, near) for column, near in near_ones if near != column.lower()]
    guess = ", ".join(f"did you mean '{near}' instead of '{column}'" for column, near in guesses[:3])
    shown = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    pair = (*columns, "COLUMN", "COLUMN")[:2]
    other = f"rename the columns, or say what they are: data.columns='{{prompt: {pair[0]}, response: {pair[1]}}}'"
    fix = f"{guess}? otherwise {other}" if guess else other
    problem = f"no known format has the columns: {shown}"
    return DataError(1, problem, where=source.place(0), fix=f"{fix}; accepted: {shapes_in_words()}")
