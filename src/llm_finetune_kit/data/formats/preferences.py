"""Rows that say which answer is better (a pair), or whether an answer is good (a label)."""

from __future__ import annotations

from typing import Any

from llm_finetune_kit.data.formats import answers
from llm_finetune_kit.data.formats.conversations import OPENAI_KEYS, SHAREGPT_KEYS, Keys, conversation, opening, turns_of_cell
from llm_finetune_kit.data.formats.rows import Example, Fault, Message, Notes, Row, listed, truth
from llm_finetune_kit.data.formats.tools import tools_of
from llm_finetune_kit.data.sources.json_flaws import in_words

Placed = list[tuple[str, Any]]  # turns, each with its place in the row
SIDES = ("messages", "prompt", "answer", "chosen", "rejected")  # slots that hold turns


def preference(row: Row, notes: Notes) -> Example:
    """A prompt with a chosen and a rejected answer, or two whole conversations that begin alike."""
    row, keys = _read(row)
    chosen, rejected = _turns(row, "chosen", "assistant", keys), _turns(row, "rejected", "assistant", keys)
    if _begins_with_a_question(chosen, keys) and _begins_with_a_question(rejected, keys):
        return _judged(row, [], chosen, rejected, keys, notes)
    prompt = _prompt(row, keys)
    if not prompt:
        raise Fault(3, "prompt", "is missing, and the answers do not begin with a question")
    return _judged(row, prompt, chosen, rejected, keys, notes)


def rejected_response(row: Row, notes: Notes) -> Example:
    """Messages (or query and response) that end with the chosen answer, and the rejected one beside them."""
    row, keys = _read(row)
    rejected = _turns(row, "rejected", "assistant", keys)
    if row.get("messages") is None:
        if "prompt" not in row or "answer" not in row:
            raise Fault(3, "messages", "is missing, and so are query and response")
        return _judged(row, _prompt(row, keys), _turns(row, "answer", "assistant", keys), rejected, keys, notes)
    turns = _turns(row, "messages", "user", keys)
    return _judged(row, turns[:-1], turns[-1:], rejected, keys, notes)


def rated(row: Row, notes: Notes) -> Example:
    """A prompt and an answer, and whether the answer is a good one."""
    label = _label(row)
    return _with_label(answers.pair(row, notes), label)


def rated_messages(row: Row, notes: Notes) -> Example:
    """A conversation, and whether its last answer is a good one."""
    label = _label(row)
    row, keys = _read(row)
    turns = row["messages"] or []
    messages = conversation(turns, keys, lambda index: f"messages[{index}]", notes)
    own = [] if messages[0]["role"] == "system" else opening(row)
    return _with_label(Example([*own, *messages], None, 0, _tools(row)), label)


def _label(row: Row) -> bool:
    label = truth(row["label"])
    if label is None:
        value = row["label"]
        shown = f"'{value[:20]}'" if type(value) is str else in_words(value)
        raise Fault(4 if value is None else 5, "label", f"is {shown}, not true or false")
    return label


def _with_label(example: Example, label: bool) -> Example:
    messages = example.messages or []
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    return Example(_prompt_unlearned(messages, last), None, 0, example.tools, label=label)


def _tools(row: Row) -> list[dict[str, Any]] | None:
    return tools_of(row["tools"]) if "tools" in row else None


# --- pairs -------------------------------------------------------------------------------------------------


def _judged(row: Row, prompt: Placed, chosen: Placed, rejected: Placed, keys: Keys, notes: Notes) -> Example:
    """The conversation with the chosen end, and what the rejected end has instead."""
    better, worse = (_messages(row, prompt + end, keys, notes) for end in (chosen, rejected))
    shared = next((at for at, both in enumerate(zip(better, worse, strict=False)) if both[0] != both[1]), None)
    if shared is None:
        raise Fault(87, "rejected", "is the same as the chosen answer" if better == worse else "adds nothing to compare")
    if any(side[shared]["role"] != "assistant" for side in (better, worse)):
        raise Fault(87, "rejected", "differs from chosen before the answer: both must answer the same question")
    rejected_end = worse[shared:]
    messages = _prompt_unlearned(better, shared)
    if messages[0]["role"] != "system":
        messages = [*opening(row), *messages]
    return Example(messages, None, 0, _tools(row), rejected=rejected_end)


def _prompt_unlearned(messages: list[Message], count: int) -> list[Message]:
    """The first `count` messages are the prompt: its answers are read, not judged."""
    prompt = [{**message, "train": False} if message["role"] == "assistant" else message for message in messages[:count]]
    return [*prompt, *messages[count:]]


def _messages(row: Row, turns: Placed, keys: Keys, notes: Notes) -> list[Message]:
    if not turns:
        raise Fault(8, next(slot for slot in SIDES if row.get(slot) == []), "is an empty conversation")
    try:
        return conversation([turn for _, turn in turns], keys, lambda index: turns[index][0], notes)
    except Fault as fault:
        slot = fault.place.removesuffix(f".{keys[1]}")
        if slot in row and type(row[slot]) is not dict:  # a column of text has no keys inside
            raise Fault(fault.number, slot, fault.problem) from None
        raise


def _read(row: Row) -> tuple[Row, Keys]:
    """The row with its tables' cells of JSON as values, and what its turns call role and content."""
    row = {slot: turns_of_cell(value) if slot in SIDES and type(value) is str else value for slot, value in row.items()}
    if row.get("messages") is not None:
        row["messages"] = listed(row["messages"], "messages")
    values = [row.get(slot) for slot in SIDES]
    turns = [turn for value in values for turn in (value if type(value) is list else [value])]
    return row, SHAREGPT_KEYS if any(type(turn) is dict and "from" in turn for turn in turns) else OPENAI_KEYS


def _turns(row: Row, slot: str, role: str, keys: Keys) -> Placed:
    """Turns of a column that holds a list of them, one of them, or its text (said by `role`)."""
    value = row[slot]
    if type(value) is list:
        return [(f"{slot}[{index}]", turn) for index, turn in enumerate(value)]
    if type(value) is dict:
        return [(slot, value)]
    return [(slot, {keys[0]: role, keys[1]: value})]


def _begins_with_a_question(turns: Placed, keys: Keys) -> bool:
    first = turns[0][1] if turns else None
    return type(first) is dict and first.get(keys[0]) in ("user", "human", "system", "prompter", "developer")


def _prompt(row: Row, keys: Keys) -> Placed:
    """The turns before the two answers: messages, a prompt, or an instruction with its input; history before them."""
    earlier = [("history", {keys[0]: past["role"], keys[1]: past["content"]}) for past in answers.history(row.get("history"))]
    if row.get("messages") is not None:
        return _turns(row, "messages", "user", keys)
    if row.get("prompt") is not None:
        return [*earlier, *_turns(row, "prompt", "user", keys)]
    if row.get("instruction") is not None:
        return [*earlier, ("instruction", {keys[0]: "user", keys[1]: answers.instructed(row)["content"]})]
    return []
