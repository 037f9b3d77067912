"""Lists of turns, in whatever spelling, as messages in their right order."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llm_finetune_kit.data.formats.rows import Example, Fault, Message, Notes, Row, Skipped, extra, listed, no_text
from llm_finetune_kit.data.formats.tools import calls_of, looks_like_calls, tools_of
from llm_finetune_kit.data.sources.json_flaws import in_words
from llm_finetune_kit.errors import nearest

Keys = tuple[str, str]  # what a turn calls its role and its content
OPENAI_KEYS: Keys = ("role", "content")
SHAREGPT_KEYS: Keys = ("from", "value")
CALL = "call"  # an assistant's turn that is a function call and nothing else
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "ai": "assistant",
    "function_call": CALL, "tool_call": CALL,
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
}  # fmt: skip
AFTER = {
    "": {"system", "user", "assistant"},
    "system": {"user", "assistant"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant"},
}
TRAIN_KEYS = ("train", "training", "loss", "weight", "loss_weight", "loss_scale")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

ANSWER_FIRST = "begin with an answer to nothing, which was left out"
QUESTION_LAST = "end with a question or a tool's result, which was left out"


def opening(row: Row) -> list[Message]:
    system = extra(row, "system")
    return [{"role": "system", "content": system}] if system else []


def openai(row: Row, notes: Notes) -> Example:
    """Turns with role and content."""
    return _turns(row, OPENAI_KEYS, notes)


def sharegpt(row: Row, notes: Notes) -> Example:
    """Turns with from and value."""
    return _turns(row, SHAREGPT_KEYS, notes)


def human_assistant(row: Row, notes: Notes) -> Example:
    """Rounds with human and assistant."""
    turns: list[Row] = []
    for index, both in enumerate(listed(row["messages"], "messages")):
        if type(both) is not dict:
            raise Fault(5, f"messages[{index}]", f"is {in_words(both)}, not an object with human and assistant")
        turns += [{"role": role, "content": both.get(key)} for role, key in (("user", "human"), ("assistant", "assistant"))]
    messages = said_in_turn(turns, lambda index: f"messages[{index // 2}].{('human', 'assistant')[index % 2]}", notes)
    return Example([*opening(row), *messages], None, 0)


def said_in_turn(turns: list[Row], place: Callable[[int], str], notes: Notes) -> list[Message]:
    """Turns that were put together from plain texts, so that a fault has the text's own place."""
    try:
        return conversation(turns, OPENAI_KEYS, place, notes)
    except Fault as fault:
        raise Fault(fault.number, fault.place.removesuffix(".content"), fault.problem) from None


def _turns(row: Row, keys: Keys, notes: Notes) -> Example:
    turns = listed(row["messages"], "messages")
    messages = conversation(turns, keys, lambda index: f"messages[{index}]", notes)
    if "system" in row and messages[0]["role"] != "system":
        messages = [*opening(row), *messages]
    return Example(messages, None, 0, tools_of(row["tools"]) if "tools" in row else None)


def turns_of_cell(text: str) -> Any:
    """The messages that a table's cell holds as JSON; text that is anything else comes back as it is."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    turns = found if type(found) is list else [found]
    named = all(type(turn) is dict and (set(OPENAI_KEYS) <= set(turn) or set(SHAREGPT_KEYS) <= set(turn)) for turn in turns)
    return found if turns and named else text


# --- order -------------------------------------------------------------------------------------------------


def conversation(turns: list[Any], keys: Keys, place: Callable[[int], str], notes: Notes) -> list[Message]:
    """Perhaps a system message, then user and assistant in alternation (with tools between), an answer at the end."""
    if not turns:
        raise Fault(8, _whole(place), "is an empty conversation")
    kept: list[Message] = []
    before, asked, answer_first = "", False, False
    for index, turn in enumerate(turns):
        try:
            message = _turn(turn, keys)
            role = message["role"]
            if role not in AFTER[before]:
                if asked and _is_joined(kept, message):
                    continue
                raise Fault(7, "", _out_of_order(role, before, index))
            before = role
            asked = asked or role == "user"
            content = message["content"]
            if not asked and role != "system":
                answer_first = True
            elif (content and not content.isspace()) or role == "tool" or "tool_calls" in message:
                kept.append(message)
            elif role == "assistant" and all(_role(rest, keys) != "assistant" for rest in turns[index + 1 :]):
                raise Skipped("empty answer")
            elif role != "system":
                raise Fault(9, f".{keys[1]}", "is empty")
        except Fault as fault:
            raise fault.inside(place(index)) from None
    notes[ANSWER_FIRST] += answer_first
    return _with_answer_last(kept, place, notes)


def _whole(place: Callable[[int], str]) -> str:
    return place(0).partition("[")[0]


def _is_joined(kept: list[Message], message: Message) -> bool:
    """Joins a call to the assistant's message before it, of which it is a part."""
    last = kept[-1]
    if last["role"] != "assistant" or message["content"] or "tool_calls" not in message:
        return False
    if last.get("train") != message.get("train"):
        return False
    kept[-1] = {**last, "tool_calls": [*last.get("tool_calls", []), *message["tool_calls"]]}
    return True


def _out_of_order(role: str, before: str, index: int) -> str:
    if role == "system" and index:
        return "is a system message, which must come first"
    if role == before:
        return f"is a second {role} message in a row"
    if role == "tool":
        return "is a tool's result that follows no call of the assistant"
    return f"is a {role} message where the assistant must answer the tool's result"


def _with_answer_last(messages: list[Message], place: Callable[[int], str], notes: Notes) -> list[Message]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Fault(8, _whole(place), "has no assistant message that answers a question")
    if not any(message.get("train", True) for message in answers):
        raise Fault(8, _whole(place), "has no assistant message that is to be learned")
    if messages[-1]["role"] != "assistant":
        notes[QUESTION_LAST] += 1
        while messages[-1]["role"] != "assistant":
            messages.pop()
    return messages


# --- one turn ----------------------------------------------------------------------------------------------


def _role(turn: Any, keys: Keys) -> str:
    said = turn.get(keys[0]) if type(turn) is dict else None
    role = ROLES.get(said.strip().lower(), "") if type(said) is str else ""
    return "assistant" if role == CALL else role


def _turn(turn: Any, keys: Keys) -> Message:
    """The message of one turn; places in faults are relative to the turn."""
    if type(turn) is not dict:
        raise Fault(4 if turn is None else 5, "", f"is {in_words(turn)}, not an object with {keys[0]} and {keys[1]}")
    said, content = turn.get(keys[0]), turn.get(keys[1])
    role = ROLES.get(said) if type(said) is str else None
    if role is None:
        role = _unusual_role(turn, keys[0])
    if len(turn) == 2 and type(content) is str and role != CALL:
        return {"role": role, "content": content}
    return _rich_turn(turn, keys[1], role)


def _unusual_role(turn: Row, key: str) -> str:
    said = turn.get(key)
    if type(said) is not str:
        raise Fault(6, f".{key}", "is missing" if key not in turn else f"is {in_words(said)}, not a role")
    said = said.strip().lower()
    if said not in ROLES:
        near = nearest(said, list(ROLES))
        guess = f": did you mean '{near[0]}'?" if near else "; known are system, user, assistant and tool"
        raise Fault(6, f".{key}", f"is the unknown role '{said[:40]}'{guess}")
    return ROLES[said]


def _rich_turn(turn: Row, key: str, role: str) -> Message:
    """A turn with more than plain text: calls, typed parts, a thought, a weight."""
    content, place = turn.get(key), f".{key}"
    message: Message = {"role": "assistant" if role == CALL else role, "content": ""}
    called = turn.get("tool_calls") or turn.get("function_call")
    calls = calls_of(called, ".tool_calls" if turn.get("tool_calls") else ".function_call") if called else []
    if role == CALL and (type(content) in (dict, list) or (type(content) is str and looks_like_calls(content))):
        calls += calls_of(content, place)
    elif role == "tool" and type(content) is dict:
        message["content"] = json.dumps(content, ensure_ascii=False)
    elif type(content) is list:
        calls += _parts(content, message, place)
    elif type(content) is str:
        message["content"] = content
    elif key not in turn and not calls:
        raise Fault(3, place, "is missing")
    elif content is not None or not calls:
        raise no_text(content, place)
    if calls:
        if message["role"] != "assistant":
            raise Fault(80, "", f"is a {role} message that calls a function: only the assistant does")
        message["tool_calls"] = calls
    _copy_thought(turn, message)
    _copy_weight(turn, message)
    if role == "tool":
        message.update({name: turn[name] for name in ("name", "tool_call_id") if type(turn.get(name)) is str})
    return message


def _parts(parts: list[Any], message: Message, place: str) -> list[dict[str, Any]]:
    """Puts typed parts such as {"type": "text", "text": ...} into the message, and returns the calls among them."""
    calls: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        here = f"{place}[{index}]"
        kind = part.get("type", "text") if type(part) is dict else "text"
        if kind == "tool_call":
            calls += calls_of(part.get("value", part.get("tool_call")), here)
        elif kind in REASONING_KEYS:
            _add(message, "reasoning_content", _part_text(part, kind, here))
        elif kind == "text":
            _add(message, "content", part if type(part) is str else _part_text(part, kind, here))
        else:
            raise Fault(5, f"{here}.type", f"is {json.dumps(kind)[:40]}: only text can be learned")
    return calls


def _add(message: Message, key: str, text: str) -> None:
    message[key] = message.get(key, "") + text


def _part_text(part: Any, kind: str, place: str) -> str:
    if type(part) is not dict:
        raise no_text(part, place)
    key = next((key for key in (kind, "text", "value") if key in part), kind)
    if type(part.get(key)) is not str:
        raise no_text(part.get(key), f"{place}.{key}")
    return str(part[key])


def _copy_thought(turn: Row, message: Message) -> None:
    for key in REASONING_KEYS:
        thought = turn.get(key)
        if thought is not None and message["role"] == "assistant":
            if type(thought) is not str:
                raise no_text(thought, f".{key}")
            if thought.strip():
                _add(message, "reasoning_content", thought)
                return


def _copy_weight(turn: Row, message: Message) -> None:
    """Whether this message is learned, if the data says so under one of the usual names."""
    for key in TRAIN_KEYS:
        weight = turn.get(key)
        if weight is not None:
            if type(weight) not in (bool, int, float) or weight not in (0, 1):
                raise Fault(5, f".{key}", "is neither true or false nor 1 or 0")
            if message.get("train", bool(weight)) != bool(weight):
                raise Fault(5, f".{key}", "says otherwise than another weight of the same message")
            message["train"] = bool(weight)
