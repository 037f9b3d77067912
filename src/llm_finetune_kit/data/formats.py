"""From rows of any known shape to one shape: messages, or plain text.

The shapes are the rows of the table `FORMATS`; what cannot be trained as it is meant becomes a fault with its place.
"""

# Faults of this module and of conversations.py (sources.py has 20 and above):
#
#   1  columns of no known format      5  not text                       9  blank text in the middle
#   2  unknown format name             6  unknown role                  10  nothing is left to train on
#   3  column missing in one row       7  order of roles                11  preference data
#   4  null where text is due          8  no answer in a conversation

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from llm_finetune_kit.data.conversations import Fault, Message, Notes, Row, Skipped, alpaca, openai, pair, sharegpt, text
from llm_finetune_kit.data.sources import Source
from llm_finetune_kit.errors import DataError, nearest


@dataclass(slots=True)
class Example:
    """One thing to learn: a conversation or a text, and the row it came from.

    `tools` are the functions the model may call, as JSON schemas. `rejected` (a worse end of the same
    conversation) and `label` (whether the end is a good one) are there in preference data only.
    """

    messages: list[Message] | None
    text: str | None
    row: int
    tools: list[dict[str, Any]] | None = None
    rejected: list[Message] | None = None
    label: bool | None = None


@dataclass(frozen=True)
class Format:
    """A shape of rows. Each slot lists the columns that may fill it, best first; all of `needs` prove the shape."""

    name: str
    needs: dict[str, tuple[str, ...]]
    convert: Callable[[Row, Notes], list[Message] | str]
    takes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    turns_have: str = ""  # for conversations: the key that every turn must carry

    def __str__(self) -> str:
        return " + ".join("/".join(columns[:4]) for columns in self.needs.values())


@dataclass(frozen=True)
class Detected:
    """The format of a source, and how it was told."""

    format: Format
    why: str


@dataclass(frozen=True)
class Formatted:
    """Examples ready for a template; what was left out (row index and reason); what the user should know."""

    examples: list[Example]
    dropped: list[tuple[int, str]]
    warnings: list[str]


# --- the table ---------------------------------------------------------------------------------------------

SYSTEM: dict[str, tuple[str, ...]] = {"system": ("system", "system_prompt")}
TOOLS: dict[str, tuple[str, ...]] = {"tools": ("tools", "functions")}
ANSWERS = (
    "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text", "completion",
    "content",
)  # fmt: skip


def _asks(name: str, question: str, answer: str) -> Format:
    return Format(name, {"prompt": (question,), "answer": (answer,)}, pair, SYSTEM)


# First match wins; the columns of `needs` prove the format, those of `takes` are used when they are there.
FORMATS: tuple[Format, ...] = (
    Format("messages", {"messages": ("messages", "conversations", "dialogue", "texts")}, openai,
           SYSTEM | TOOLS, "role"),
    Format("sharegpt", {"messages": ("conversations", "conversation", "messages")}, sharegpt, SYSTEM | TOOLS, "from"),
    Format("alpaca", {"instruction": ("instruction",), "output": ("output",)}, alpaca,
           {"input": ("input", "context"), "history": ("history",)} | SYSTEM),
    Format("dolly", {"instruction": ("instruction",), "output": ("response",)}, alpaca,
           {"input": ("context", "input"), "history": ("history",)} | SYSTEM),
    Format("instruction-answer", {"instruction": ("instruction",), "output": ANSWERS}, alpaca,
           {"input": ("input", "context"), "history": ("history",)} | SYSTEM),
    _asks("prompt-response", "prompt", "response"),
    _asks("prompt-completion", "prompt", "completion"),
    _asks("question-answer", "question", "answer"),
    _asks("query-answer", "query", "answer"),
    _asks("query-response", "query", "response"),
    Format("pairs", {"prompt": ("query", "prompt", "input", "question", "problem"), "answer": ANSWERS}, pair, SYSTEM),
    Format("text", {"text": ("text", "content")}, text),
)  # fmt: skip

EXPECTED = sorted({name for shape in FORMATS for names in (shape.needs | shape.takes).values() for name in names})


def shapes_in_words() -> str:
    """The accepted shapes, for messages to people."""
    return "; ".join(f"{shape.name} ({shape})" for shape in FORMATS)


# --- which format it is ------------------------------------------------------------------------------------


def detect(source: Source, asked: str | None) -> Detected:
    """The format of the rows, from the columns of the first one; every row is held to it by `to_examples`."""
    columns = tuple(source.rows[0])
    lowered = {column.lower(): column for column in columns}
    if asked is not None:
        return _as_asked(source, asked, lowered)
    _refuse_preferences(source, lowered)
    for shape in FORMATS:
        used = _filled(shape, lowered)
        if _proves(shape, used, source):
            _refuse_misspelt(shape, used, lowered, source)
            proof = " + ".join(used[slot] for slot in shape.needs)
            unused = [column for column in columns if column not in used.values()]
            rest = f"; not used: {', '.join(unused[:20])}" if unused else ""
            return Detected(shape, f"found {proof}{rest}")
    raise _unknown(source, list(columns))


def _as_asked(source: Source, asked: str, lowered: dict[str, str]) -> Detected:
    name = asked.strip().lower().replace("_", "-").replace("/", "-")
    name = {"openai": "messages", "chatml": "messages", "raw": "text"}.get(name, name)
    shape = next((shape for shape in FORMATS if shape.name == name), None)
    names = [shape.name for shape in FORMATS]
    if shape is None:
        near = nearest(name, names)
        guess = f"did you mean {near[0]}? " if near else ""
        raise DataError(2, f"there is no format '{asked}'", fix=f"{guess}known: {', '.join(names)}")
    missing = [columns for slot, columns in shape.needs.items() if slot not in _filled(shape, lowered)]
    if missing:
        problem = f"format {name} needs {shape}, but the columns are: {', '.join(lowered.values()) or 'none'}"
        fix = f"rename the column that is meant as '{missing[0][0]}', or leave data.format out to have it detected"
        raise DataError(1, problem, where=source.place(0), fix=fix)
    return Detected(shape, "you asked for it")


def _filled(shape: Format, lowered: dict[str, str]) -> dict[str, str]:
    """The column of each slot that has one; a column fills one slot only."""
    used: dict[str, str] = {}
    for slot, names in (*shape.needs.items(), *shape.takes.items()):
        column = next((lowered[name] for name in names if name in lowered and lowered[name] not in used.values()), None)
        if column is not None:
            used[slot] = column
    return used


def _proves(shape: Format, used: dict[str, str], source: Source) -> bool:
    """Whether all needed columns are there and, for conversations, the turns are of the shape's kind."""
    if any(slot not in used for slot in shape.needs):
        return False
    if not shape.turns_have:
        return True
    values = (row.get(used["messages"]) for row in source.rows[:1000])
    turn = next((value[0] for value in values if type(value) is list and value), None)
    if type(turn) is dict:
        return shape.turns_have in turn
    return used["messages"].lower() == {"role": "messages", "from": "conversations"}[shape.turns_have]


def _refuse_preferences(source: Source, lowered: dict[str, str]) -> None:
    """Chosen and rejected answers must not be learned as if all of them were good."""
    rated = next((lowered[name] for name in ("label", "kto_tag") if name in lowered), "")
    if {"chosen", "rejected"} <= set(lowered):
        what = "the columns chosen and rejected"
    elif rated and type(source.rows[0][rated]) is bool:
        what = f"true or false in the column {rated}"
    else:
        return
    why = "half of its answers are examples of what not to say"
    fix = "keep the good answers only, in a column named response; or set data.format to train on the rows as they are"
    raise DataError(11, f"preference data ({what}) is not trained yet", where=source.name, why=why, fix=fix)


def _refuse_misspelt(shape: Format, used: dict[str, str], lowered: dict[str, str], source: Source) -> None:
    """A column such as 'inputs' or 'instructon' would be left out in silence; better ask."""
    hoped = [name for slot, names in shape.takes.items() if slot not in used for name in names]
    hoped += ["instruction"] if shape.name == "pairs" else []
    for name, column in lowered.items():
        near = get_close_matches(name, hoped, n=1, cutoff=0.88) if column not in used.values() else []
        if near:
            fix = f"rename it to '{near[0]}', or set data.format={shape.name} if the column is not meant to be used"
            problem = f"the column '{column}' would not be used: did you mean '{near[0]}'?"
            raise DataError(1, problem, where=source.place(0), fix=fix)


def _unknown(source: Source, columns: list[str]) -> DataError:
    if not columns:
        return DataError(1, "has no columns", where=source.place(0), fix=f"accepted: {shapes_in_words()}")
    near_ones = ((column, near) for column in columns for near in nearest(column.lower(), EXPECTED))
    guesses = [(column, near) for column, near in near_ones if near != column.lower()]
    guess = ", ".join(f"did you mean '{near}' instead of '{column}'" for column, near in guesses[:3])
    shown = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    accepted = f"accepted: {shapes_in_words()}"
    fix = f"{guess}? otherwise rename the columns; {accepted}" if guess else f"rename the columns; {accepted}"
    return DataError(1, f"no known format has the columns: {shown}", where=source.place(0), fix=fix)


# --- all rows ----------------------------------------------------------------------------------------------


def to_examples(
    source: Source, detected: Detected, *, on_bad_rows: Literal["stop", "drop"], system_prompt: str | None
) -> Formatted:
    """Every row as an example. Faulty rows stop the run or are dropped; rows without an answer are counted."""
    notes: Notes = Counter()
    examples: list[Example] = []
    faults: list[tuple[int, Fault]] = []
    skipped: list[tuple[int, str]] = []
    views: dict[tuple[str, ...], dict[str, str]] = {}
    convert = detected.format.convert
    for index, row in enumerate(source.rows):
        shape = tuple(row)
        try:
            view = views[shape] if shape in views else views.setdefault(shape, _view(detected.format, shape))
            content = convert({slot: row[column] for slot, column in view.items()}, notes)
        except Fault as fault:
            faults.append((index, fault))
        except Skipped as reason:
            skipped.append((index, str(reason)))
        else:
            if isinstance(content, str):
                examples.append(Example(None, content, index))
            else:
                examples.append(Example(_with_system(content, system_prompt), None, index))
    faults = [(index, _in_columns(fault, views.get(tuple(source.rows[index]), {}))) for index, fault in faults]
    if faults and on_bad_rows == "stop":
        raise _first_bad(source, faults)
    dropped = sorted([*skipped, *((index, str(fault)) for index, fault in faults)])
    if not examples:
        common = Counter(reason for _, reason in dropped).most_common(3)
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in common)
        fix = "correct the rows, or check that data.format and the columns are the right ones"
        raise DataError(10, f"none of {len(source.rows):,} rows can be used", where=source.name, why=reasons, fix=fix)
    return Formatted(examples, dropped, _warnings(source, notes, skipped, faults))


def _view(shape: Format, columns: tuple[str, ...]) -> dict[str, str]:
    """Which column of a row fills which slot."""
    lowered = {column.lower(): column for column in reversed(columns)}
    used = _filled(shape, lowered)
    for slot, names in shape.needs.items():
        if slot not in used:
            found = ", ".join(columns[:20]) or "no columns"
            raise Fault(3, names[0], f"is missing (the row has {found})")
    return used


def _with_system(messages: list[Message], prompt: str | None) -> list[Message]:
    if prompt and messages[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *messages]
    return messages


def _in_columns(fault: Fault, view: dict[str, str]) -> Fault:
    """The fault with the file's own column name instead of the slot's."""
    end = next((at for at, mark in enumerate(fault.place) if mark in ".["), len(fault.place))
    slot = fault.place[:end]
    return Fault(fault.number, view.get(slot, slot) + fault.place[end:], fault.problem)


def _first_bad(source: Source, faults: Sequence[tuple[int, Fault]]) -> DataError:
    index, fault = faults[0]
    others = [other for other, _ in faults[1:]]
    more = f"{len(others):,} more rows have faults" if len(others) > 1 else "1 more row has a fault"
    why = f"{more} ({source.spots(others)})" if others else ""
    fix = "correct the row, or set data.on_bad_rows=drop to train without it"
    where = f"{source.place(index)}, field {fault.place}" if fault.place else source.place(index)
    return DataError(fault.number, fault.problem, where=where, why=why, fix=fix)


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
