"""What a chat template can render, found out by asking it, and conversations in the shape it takes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from llm_finetune_kit.catalog import DEFAULT_TEMPLATE
from llm_finetune_kit.errors import ConfigError, ModelError

# Faults of this module:  120 template file not readable   121 template with an error in it   122 template without end

Message = dict[str, Any]
Render = Callable[[list[Message], list[dict[str, Any]] | None], str]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NINE = "call00000"  # Mistral's templates want ids of nine characters
MANY_TURNS = 20  # questions and answers of the longest conversation that a template is tried with
MOST_TURNS = 100_000  # turns of loops and calls that a template may take for a conversation of a few words
MOST_TEXT = 200_000  # characters that it may make of it
MOST_SECONDS = 5.0  # of processor time: a busy or suspended machine refuses no template
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
    """The template to use, found safe to render, and where it comes from: `tokenizer`, `default` or the file's name.

    `asked` is None (the tokenizer's own, else the default), "default", or the path of a .jinja file. `own` is
    what the tokenizer has: a text, several by name, or nothing. Raises ConfigError if the file cannot be read and
    ModelError where `vet` does.
    """
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    if asked is None and own:
        vet(str(own), "tokenizer")
        return str(own), "tokenizer"
    if asked is None:
        return DEFAULT_TEMPLATE, "default"
    if asked == "default":
        return DEFAULT_TEMPLATE, "default"
    try:
        text = Path(asked).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            120,
            "the chat template cannot be read",
            where=f"data.template: {asked}",
            why=str(error),
            fix="name a .jinja text file, or `default`, or leave the setting out to use the tokenizer's own template",
        ) from error
    vet(text, Path(asked).name)
    return text, Path(asked).name


class _TooMuch(Exception):
    """A template goes on and on, or writes and writes."""

    lineno: int | None = None


@lru_cache(maxsize=64)
def vet(template: str, source: str) -> None:
    """Raise ModelError, with the line, for a template with a fault of syntax, one that reaches for Python's insides, and one
    that would not end or would write without end.

    It is rendered on a conversation of every shape that data come in, in transformers' sandbox, with every turn of a loop and
    every call counted. What it refuses to render is for `check` and `abilities`.
    """
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    try:
        counted = _counted(template)
        for talk, tools, ask in product(_talks(), (None, PROBE_TOOLS), (False, True)):
            try:
                counted(messages=talk, tools=tools, add_generation_prompt=ask, bos_token="b", eos_token="e")
            except (_TooMuch, SecurityError):
                raise
            except Exception:  # a template may refuse what it does not know by any error of its own
                continue
    except (_TooMuch, SecurityError, TemplateSyntaxError) as error:
        endless = isinstance(error, _TooMuch)
        raise ModelError(
            122 if endless else 121,
            f"the chat template {error}" if endless else f"the chat template does not work: {error}",
            where=f"chat template ({source}){_line(error)}",
            why="it was asked to render a few words" if endless else "",
            fix="correct the template, or use the documented one: data.template=default",
        ) from error


def _talks() -> tuple[list[Message], ...]:
    """Conversations of the shapes that data come in: short and long, with a system prompt, thoughts, one call and two."""
    system, user, answer = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
    thought, empty = answer | {"reasoning_content": "b"}, answer | {"content": ""}
    call = _tool_talk(NINE)
    two = [call[0], call[1] | {"tool_calls": 2 * call[1]["tool_calls"]}, call[2], *call[2:]]
    short, long = [user, answer], MANY_TURNS * [user, answer]
    return (
        short,
        long,
        [system, *short],
        [system, *long],
        [user, empty],
        [user, thought, user, thought],
        call,
        [system, *two, *short],
    )


def _line(error: Exception) -> str:
    """Where in the template: jinja puts the template's own lines into the traceback."""
    number, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            number = trace.tb_lineno
        trace = trace.tb_next
    return f" line {number}" if number else ""


def _refuse_great_constants(tree: Any) -> None:
    """Raise _TooMuch for what transformers' own environment would compute while it compiles the template."""
    from jinja2 import nodes

    def size(node: Any) -> int:
        if isinstance(node, nodes.Mul):
            return size(node.left) * size(node.right)
        value = getattr(node, "value", 1)
        return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 1

    for node in tree.find_all((nodes.Pow, nodes.Mul, nodes.Const)):
        if isinstance(node, nodes.Pow) or (size(node) > MOST_TEXT and not isinstance(getattr(node, "value", 1), str)):
            error = _TooMuch("computes with huge numbers")
            error.lineno = node.lineno
            raise error


def _counted(template: str) -> Callable[..., None]:
    """The template as a function that renders it and raises _TooMuch once it takes too many turns, or writes too much."""
    from jinja2 import Template, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment.overlay(optimized=False)  # constants would be computed by parsing
    call, binop = environment.call, environment.call_binop
    spent = {"turns": 0, "end": 0.0}

    def turn() -> None:
        spent["turns"] += 1
        if spent["turns"] > MOST_TURNS or time.thread_time() > spent["end"]:
            raise _TooMuch("does not come to an end")

    def turns(values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            turn()
            yield value

    def short(value: Any) -> Any:
        if isinstance(value, (str, list, tuple)) and len(value) > MOST_TEXT:
            raise _TooMuch("writes without end")
        return value

    def watched_call(context: Any, function: Any, *args: Any, **how: Any) -> Any:
        turn()
        return short(call(context, function, *args, **how))

    def watched_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        for text, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int) and hasattr(text, "__len__") and len(text) * times > MOST_TEXT:
                raise _TooMuch("writes without end")
        return short(binop(context, operator, left, right))

    environment.filters = environment.filters | {"turns of a loop": turns, "short": short}
    environment.intercepted_binops = frozenset(("*", "+"))
    environment.call, environment.call_binop = watched_call, watched_binop
    tree = environment.parse(template)
    _refuse_great_constants(tree)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "turns of a loop", [], [], None, None, lineno=loop.lineno)
    for holder in list(tree.find_all(nodes.Assign)):  # `~` and filters can double a text only by being assigned again
        holder.node = nodes.Filter(holder.node, "short", [], [], None, None, lineno=holder.lineno)
    made = Template.from_code(environment, environment.compile(tree), environment.make_globals(None))

    def render(**given: Any) -> None:
        spent["turns"], spent["end"] = 0, time.thread_time() + MOST_SECONDS
        written = 0
        for piece in made.generate(**given):
            written += len(piece)
            if written > MOST_TEXT:
                raise _TooMuch("writes without end")

    return render


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
