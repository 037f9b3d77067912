"""From one row to what is learned from it: messages in their order and with their roles, or a text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from llm_finetune_kit.data.json_flaws import in_words
from llm_finetune_kit.errors import nearest

Row = dict[str, Any]
Message = dict[str, Any]  # role and content; train where the data says it; instruction and input for the template
Notes = Counter[str]  # what was done to rows, and to how many of them


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
