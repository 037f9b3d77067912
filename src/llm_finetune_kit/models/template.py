"""What a chat template can render, found out by asking it, and conversations in the shape it takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.catalog import DEFAULT_TEMPLATE
from llm_finetune_kit.errors import ConfigError, ModelError

# Faults of this module:  120 template file not readable   121 template with an error in it

Message = dict[str, Any]
Render = Callable[[list[Message], list[dict[str, Any]] | None], str]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NINE = "call00000"  # Mistral's templates want ids of nine characters
PROBE_TOOLS = [
    {
        "type": "function",
        "function": {"name": "zqweather", "description": "zqabout", "parameters": {"type": "object", "properties": {}}},
    }
]


@dataclass(frozen=True)
class Abilities:
    """What comes through a template."""

    system: bool  # a system prompt is rendered, also once the conversation is answered
    tools: bool  # functions, calls and results are rendered
    nine_letter_ids: bool  # calls need ids of nine characters
    thoughts: bool  # `reasoning_content` is rendered


def abilities(render: Render) -> Abilities:
    """Ask the template: what it refuses, or leaves out of the text, it cannot do."""

    def shows(messages: list[Message], words: tuple[str, ...], tools: list[dict[str, Any]] | None = None) -> bool:
        try:
            text = render(messages, tools)
        except ModelError:
            return False
        return all(word in text for word in words)

    user, answer = {"role": "user", "content": "zqask"}, {"role": "assistant", "content": "zqanswer"}
    words = ("zqweather", "zqabout", "zqplace", "zqresult")
    nine, longer = (shows(_tool_talk(name), words, PROBE_TOOLS) for name in (NINE, NINE * 3))
    return Abilities(
        system=shows([{"role": "system", "content": "zqking"}, user, answer], ("zqking",)),
        tools=nine,
        nine_letter_ids=nine and not longer,
        thoughts=shows([user, answer | {"reasoning_content": "zqthought"}], ("zqthought",)),
    )


def _tool_talk(name: str) -> list[Message]:
    call = {"type": "function", "id": name, "function": {"name": "zqweather", "arguments": {"zqplace": "there"}}}
    return [
        {"role": "user", "content": "zqask"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "zqresult", "tool_call_id": name},
        {"role": "assistant", "content": "zqanswer"},
    ]


def shaped(messages: list[Message], can: Callable[[], Abilities]) -> list[Message]:
    """The conversation as a template with these abilities takes it; the same list where nothing need change.

    A system prompt it cannot render stands at the head of the first user message, thoughts it does not know
    stand in the answer between <think> marks, and calls get ids of nine characters where it wants those.
    """
    if messages and messages[0]["role"] == "system" and not can().system:
        messages = _system_in_front(messages)
    if any("reasoning_content" in message for message in messages) and not can().thoughts:
        messages = [_thought_inside(message) for message in messages]
    if any("tool_calls" in message for message in messages) and can().nine_letter_ids:
        messages = _numbered(messages)
    return messages


def _system_in_front(messages: list[Message]) -> list[Message]:
    system, rest = messages[0]["content"], messages[1:]
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    apart = ("instruction", "input")  # the two halves of the content, for templates that render them apart
    first = {key: value for key, value in rest[0].items() if key not in apart}
    content = f"{system}\n\n{first['content']}" if system.strip() else first["content"]
    return [first | {"content": content}, *rest[1:]]


def _thought_inside(message: Message) -> Message:
    thought = message.get("reasoning_content")
    if not isinstance(thought, str):
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return (
        rest | {"content": f"<think>\n{thought.strip()}\n</think>\n\n{message['content'].lstrip()}"} if thought.strip() else rest
    )


def _numbered(messages: list[Message]) -> list[Message]:
    """Calls numbered through the conversation; results belong to the calls before them, in their order."""
    made: list[Message] = []
    count = 0
    waiting: list[str] = []
    for message in messages:
        if message.get("tool_calls"):
            waiting = [f"call{count + place:05d}" for place in range(len(message["tool_calls"]))]
            count += len(waiting)
            calls = [call | {"id": name} for call, name in zip(message["tool_calls"], waiting, strict=True)]
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool":
            message = message | {"tool_call_id": waiting.pop(0) if waiting else NINE}
        made.append(message)
    return made


def chosen(asked: str | None, own: Any) -> tuple[str, str]:
    """The template to use and where it comes from: `tokenizer`, `default` or the file's name.

    `asked` is None (the tokenizer's own, else the default), "default", or the path of a .jinja file. `own` is
    what the tokenizer has: a text, several by name, or nothing. Raises ConfigError if the file cannot be read.
    """
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    if asked is None:
        return (str(own), "tokenizer") if own else (DEFAULT_TEMPLATE, "default")
    if asked == "default":
        return DEFAULT_TEMPLATE, "default"
    try:
        return Path(asked).expanduser().read_text(encoding="utf-8"), Path(asked).name
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            120,
            "the chat template cannot be read",
            where=f"data.template: {asked}",
            why=str(error),
            fix="name a .jinja text file, or `default`, or leave the setting out to use the tokenizer's own template",
        ) from error


def check(template: str, source: str, render: Render) -> None:
    """Raises ModelError, with the line, where a template has an error in it or does not render one question and answer."""
    from jinja2 import TemplateSyntaxError

    talk = [{"role": "user", "content": "zqask"}, {"role": "assistant", "content": "zqanswer"}]
    fix = "correct the template, or use the documented one: data.template=default"
    try:
        text = render(talk, None)
    except ModelError as error:
        cause = error.__cause__
        line = f" line {cause.lineno}" if isinstance(cause, TemplateSyntaxError) else ""
        raise ModelError(
            121,
            f"the chat template does not work: {cause}",
            where=f"chat template ({source}){line}",
            why="it was asked to render one question and one answer",
            fix=fix,
        ) from cause
    if not text.strip():
        raise ModelError(121, "the chat template renders nothing", where=f"chat template ({source})", fix=fix)
