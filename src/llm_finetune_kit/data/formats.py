"""From rows of any known shape to one shape: messages, or plain text.

The shapes are the rows of the table `FORMATS`; what cannot be trained as it is meant becomes a fault with its place.
"""

# Faults of this module (sources.py has 20 and above):
#
#   1  columns of no known format      5  not text                       9  blank text in the middle
#   2  unknown format name             6  unknown role                  10  nothing is left to train on
#   3  column missing in one row       7  order of roles                11  preference data
#   4  null where text is due          8  no answer in a conversation

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from llm_finetune_kit.data.sources import Source, in_words
from llm_finetune_kit.errors import DataError, nearest

Row = dict[str, Any]
Message = dict[str, Any]  # role and content; train where the data says it; instruction and input for the template
Notes = Counter[str]  # what was done to rows, and to how many of them


@dataclass(slots=True)
class Example:
    """One thing to learn: a conversation or a text, and the row it came from."""

    messages: list[Message] | None
    text: str | None
    row: int


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


# --- rows to messages --------------------------------------------------------------------------------------


def _no_text(value: Any, place: str) -> Fault:
    if value is None:
        return Fault(4, place, "is null")
    return Fault(5, place, f"is {in_words(value)}, not text")


def _words(row: Row, slot: str) -> str:
    value = row[slot]
    if type(value) is not str:
        raise _no_text(value, slot)
    return value


def _extra(row: Row, slot: str) -> str:
    """Optional text: missing, null and blank are all the same."""
    value = row.get(slot)
    if value is None:
        return ""
    if type(value) is not str:
        raise _no_text(value, slot)
    return "" if value.isspace() else value


def _answer(row: Row, slot: str) -> Message:
    content = _words(row, slot)
    if not content or content.isspace():
        raise Skipped("empty answer")
    return {"role": "assistant", "content": content}


def _opening(row: Row) -> list[Message]:
    system = _extra(row, "system")
    return [{"role": "system", "content": system}] if system else []


def alpaca(row: Row, notes: Notes) -> list[Message]:
    """An instruction with an optional input; a template may render the two apart, so both are kept."""
    instruction, given = _words(row, "instruction"), _extra(row, "input")
    blank = not instruction or instruction.isspace()
    if blank and not given:
        raise Fault(9, "instruction", "is empty")
    user: Message = {"role": "user", "content": given if blank else instruction}
    if given and not blank:
        user = {"role": "user", "content": f"{instruction}\n\n{given}", "instruction": instruction, "input": given}
    return [*_opening(row), *_history(row.get("history")), user, _answer(row, "output")]


def _history(pairs: Any) -> list[Message]:
    """Earlier turns, as pairs of question and answer."""
    messages: list[Message] = []
    if pairs is not None and type(pairs) is not list:
        raise Fault(5, "history", f"is {in_words(pairs)}, not a list of pairs")
    for index, pair in enumerate(pairs or []):
        if type(pair) is not list or len(pair) != 2:
            raise Fault(5, f"history[{index}]", "is not a pair [question, answer]")
        for side, (role, content) in enumerate(zip(("user", "assistant"), pair, strict=True)):
            if type(content) is not str:
                raise _no_text(content, f"history[{index}][{side}]")
            if not content or content.isspace():
                raise Fault(9, f"history[{index}][{side}]", "is empty")
            messages.append({"role": role, "content": content})
    return messages


def pair(row: Row, notes: Notes) -> list[Message]:
    """A prompt and its answer, each a text or a list of messages; of these only the answer's are learned."""
    prompt, answer = row["prompt"], row["answer"]
    if type(prompt) is list or type(answer) is list:
        return _pair_of_lists(row, notes)
    content = _words(row, "prompt")
    if not content or content.isspace():
        raise Fault(9, "prompt", "is empty")
    return [*_opening(row), {"role": "user", "content": content}, _answer(row, "answer")]


def _pair_of_lists(row: Row, notes: Notes) -> list[Message]:
    asked = row["prompt"] if type(row["prompt"]) is list else [{"role": "user", "content": row["prompt"]}]
    given = row["answer"] if type(row["answer"]) is list else [{"role": "assistant", "content": row["answer"]}]
    messages = [] if asked[:1] and _is_system(asked[0]) else list[Any](_opening(row))
    asked = [{"train": False, **turn} if _role(turn, OPENAI_KEYS) == "assistant" else turn for turn in asked]
    ahead, half = len(messages), len(asked)

    def place(index: int) -> str:
        index -= ahead
        return f"prompt[{index}]" if index < half else f"answer[{index - half}]"

    return _conversation([*messages, *asked, *given], OPENAI_KEYS, place, notes)


def _is_system(turn: Any) -> bool:
    return type(turn) is dict and turn.get("role") in ("system", "developer")


def openai(row: Row, notes: Notes) -> list[Message]:
    """Turns with role and content."""
    return _turns(row, OPENAI_KEYS, notes)


def sharegpt(row: Row, notes: Notes) -> list[Message]:
    """Turns with from and value."""
    return _turns(row, SHAREGPT_KEYS, notes)


def text(row: Row, notes: Notes) -> str:
    """Text to continue; no roles."""
    content = _words(row, "text")
    if not content or content.isspace():
        raise Skipped("empty text")
    return content


# --- conversations -----------------------------------------------------------------------------------------

OPENAI_KEYS = ("role", "content")
SHAREGPT_KEYS = ("from", "value")
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "user", "function": "user", "observation": "user", "function_response": "user", "tool_response": "user",
}  # fmt: skip
CALLS = {"function_call", "tool_call"}
RESULTS = {"tool", "function", "observation", "function_response", "tool_response"}
TRAIN_KEYS = ("train", "training", "loss", "weight", "loss_weight")

TOOLS_AS_TEXT = "hold tool calls: the calls are learned as the assistant's text, their results are read as the user's"
TOOLS_UNSEEN = "list tools, which are not shown to the model"
ANSWER_FIRST = "begin with an answer to nothing, which was left out"
QUESTION_LAST = "end with a question, which was left out"


def _turns(row: Row, keys: tuple[str, str], notes: Notes) -> list[Message]:
    turns = row["messages"]
    if turns is None:
        raise Fault(4, "messages", "is null")
    if type(turns) is not list:
        raise Fault(5, "messages", f"is {in_words(turns)}, not a list")
    if not turns:
        raise Fault(8, "messages", "is an empty conversation")
    if row.get("tools"):
        notes[TOOLS_UNSEEN] += 1
    opening: list[Message] = _opening(row) if "system" in row else []
    messages = _conversation(turns, keys, lambda index: f"messages[{index}]", notes)
    return [*opening, *messages] if messages[0]["role"] != "system" else messages


def _conversation(turns: list[Any], keys: tuple[str, str], place: Callable[[int], str], notes: Notes) -> list[Message]:
    """Turns in order: perhaps a system message, then user and assistant in alternation, an answer at the end."""
    kept: list[Message] = []
    before, said_before, tools, answer_first = "", "", False, False
    for index, turn in enumerate(turns):
        try:
            said, message = _turn(turn, keys)
            role = message["role"]
            tools = tools or said in CALLS or said in RESULTS or bool(turn.get("tool_calls"))
            if role == before and said in RESULTS and said_before in RESULTS:
                kept[-1] = {**kept[-1], "content": f"{kept[-1]['content']}\n{message['content']}"}
                continue
            _check_order(role, before, index)
            if role == "assistant" and before in ("", "system"):
                answer_first = True
            elif message["content"].strip():
                kept.append(message)
            elif role == "assistant" and all(_role(rest, keys) != "assistant" for rest in turns[index + 1 :]):
                raise Skipped("empty answer")
            elif role != "system":
                raise Fault(9, f".{keys[1]}", "is empty")
        except Fault as fault:
            raise fault.inside(place(index)) from None
        before, said_before = role, said
    notes[ANSWER_FIRST] += answer_first
    notes[TOOLS_AS_TEXT] += tools
    return _with_answer_last(kept, place, notes)


def _check_order(role: str, before: str, index: int) -> None:
    if role == "system" and index:
        raise Fault(7, "", "is a system message, which must come first")
    if role == before:
        raise Fault(7, "", f"is a second {role} message in a row")


def _with_answer_last(messages: list[Message], place: Callable[[int], str], notes: Notes) -> list[Message]:
    whole = place(0).partition("[")[0]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Fault(8, whole, "has no assistant message that answers a question")
    if not any(message.get("train", True) for message in answers):
        raise Fault(8, whole, "has no assistant message that is to be learned")
    if messages[-1]["role"] == "user":
        notes[QUESTION_LAST] += 1
        return messages[:-1]
    return messages


def _role(turn: Any, keys: tuple[str, str]) -> str:
    said = turn.get(keys[0]) if type(turn) is dict else None
    return ROLES.get(said.strip().lower(), "") if type(said) is str else ""


def _turn(turn: Any, keys: tuple[str, str]) -> tuple[str, Message]:
    """The role as it was written, and the message; places in faults are relative to the turn."""
    if type(turn) is not dict:
        raise Fault(4 if turn is None else 5, "", f"is {in_words(turn)}, not an object with {keys[0]} and {keys[1]}")
    said, content = turn.get(keys[0]), turn.get(keys[1])
    if type(said) is not str:
        raise Fault(6, f".{keys[0]}", "is missing" if keys[0] not in turn else f"is {in_words(said)}, not a role")
    if said not in ROLES:
        said = said.strip().lower()
    if said not in ROLES:
        near = nearest(said, list(ROLES))
        guess = f": did you mean '{near[0]}'?" if near else "; known are system, user, assistant and tool"
        raise Fault(6, f".{keys[0]}", f"is the unknown role '{said[:40]}'{guess}")
    if type(content) is not str or "tool_calls" in turn:
        content = _joined(turn, keys[1])
    message: Message = {"role": ROLES[said], "content": content}
    if len(turn) > 2:
        _copy_weight(turn, message)
    return said, message


def _joined(turn: Row, key: str) -> str:
    """Content that is not one plain text: typed parts, and tool calls after or instead of it."""
    content, calls = turn.get(key), turn.get("tool_calls") or []
    said = [json.dumps(_call(call), ensure_ascii=False) for call in (calls if type(calls) is list else [calls])]
    if content is None and said:
        return "\n".join(said)
    if key not in turn:
        raise Fault(3, f".{key}", "is missing")
    if type(content) is list:
        content = "".join(_part(part, f".{key}[{index}]") for index, part in enumerate(content))
    if type(content) is not str:
        raise _no_text(content, f".{key}")
    return "\n".join(filter(None, [content, *said]))


def _call(call: Any) -> Any:
    return call["function"] if type(call) is dict and "function" in call else call


def _part(part: Any, place: str) -> str:
    """One typed part, such as {"type": "text", "text": ...}; only text is learned here."""
    if type(part) is str:
        return part
    if type(part) is not dict:
        raise _no_text(part, place)
    if part.get("type", "text") != "text":
        raise Fault(5, f"{place}.type", f"is {json.dumps(part['type'])[:40]}: only text parts can be learned")
    key = "text" if "text" in part else "value"
    if type(part.get(key)) is not str:
        raise _no_text(part.get(key), f"{place}.{key}")
    return str(part[key])


def _copy_weight(turn: Row, message: Message) -> None:
    """Whether this message is learned, if the data says so under one of the usual names."""
    for key in TRAIN_KEYS:
        weight = turn.get(key)
        if weight is not None:
            if type(weight) not in (bool, int, float) or weight not in (0, 1):
                raise Fault(5, f".{key}", "is neither true or false nor 1 or 0")
            message["train"] = bool(weight)


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
