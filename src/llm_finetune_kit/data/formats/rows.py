"""One row and what becomes of it: the example, the words for what goes wrong, and checks that all shapes share."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from llm_finetune_kit.data.sources.json_flaws import in_words

Row = dict[str, Any]
Notes = Counter[str]  # what was done to rows, and to how many of them

# role ("system", "user", "assistant" or "tool") and content (text, always); where the row says so also:
# train (False: not learned), tool_calls (see tools.py), reasoning_content (the thought before the answer), name and
# tool_call_id (of a tool's result), instruction and input (a template may render the two apart).
Message = dict[str, Any]


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


class Fault(ValueError):
    """One row cannot be used: where in the row, and why."""

    def __init__(self, number: int, place: str, problem: str) -> None:
        super().__init__(problem)
        self.number, self.place, self.problem = number, place, problem

    def inside(self, part: str) -> Fault:
        return Fault(self.number, part + self.place, self.problem)

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}" if self.place else self.problem


class Skipped(ValueError):
    """One row has nothing to learn from; this is counted, and no fault."""


def no_text(value: Any, place: str) -> Fault:
    if value is None:
        return Fault(4, place, "is null")
    return Fault(5, place, f"is {in_words(value)}, not text")


def words(row: Row, slot: str) -> str:
    """Text that must be there, though it may be blank."""
    value = row[slot]
    if type(value) is not str:
        raise no_text(value, slot)
    return value


def extra(row: Row, slot: str) -> str:
    """Optional text: missing, null and blank are all the same."""
    value = row.get(slot)
    if value is None:
        return ""
    if type(value) is not str:
        raise no_text(value, slot)
    return "" if value.isspace() else value


def listed(value: Any, place: str) -> list[Any]:
    """A list, or the JSON text of one as a table's cell holds it."""
    if type(value) is list:
        return value
    if value is None:
        raise Fault(4, place, "is null")
    if type(value) is not str:
        raise Fault(5, place, f"is {in_words(value)}, not a list")
    found = parsed(value, place, 82, "is text, and no JSON list")
    if type(found) is not list:
        raise Fault(82, place, f"is the JSON text of {in_words(found)}, not of a list")
    return found


def parsed(text: str, place: str, number: int, problem: str) -> Any:
    """The value that JSON text stands for, or the fault `number` with `problem`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        cause = f" ({error.msg} at character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
        raise Fault(number, place, f"{problem}{cause}") from None


TRUTHS = {"true": True, "false": False, "1": True, "0": False}


def truth(value: Any) -> bool | None:
    """True or false as data spells it: a boolean, 1 or 0, or their text in a table's cell; None for anything else."""
    if type(value) is bool:
        return value
    if type(value) in (int, float) and value in (0, 1):
        return bool(value)
    return TRUTHS.get(value.strip().lower()) if type(value) is str else None
