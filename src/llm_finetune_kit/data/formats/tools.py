"""Functions a model may call: read from the spellings in use, and written as plain text where a template has no tools.

One shape inside the package: `tool_calls` of an assistant message is a list of
`{"type": "function", "function": {"name": str, "arguments": dict}}` (with an `id` where the data has one), the
result is a message of role "tool", and `Example.tools` is a list of `{"type": "function", "function": {...}}`.
"""

# Faults of this module (formats.py has the list):
#
#   80  a call that is no function call      81  tools that are no list of functions

from __future__ import annotations

import json
from typing import Any

from llm_finetune_kit.data.formats.rows import Fault, Message, parsed
from llm_finetune_kit.data.sources.json_flaws import in_words

TOOLS_OFFERED = "You may call these functions. Call one by writing its name and arguments as JSON."


def tools_of(value: Any, place: str = "tools") -> list[dict[str, Any]] | None:
    """The functions a row offers: a list or its JSON text, each one bare or wrapped; None where there are none."""
    if type(value) is str:
        if not value.strip():
            return None
        value = parsed(value, place, 81, "is no JSON list of functions")
    if value is None or value == [] or value == {}:
        return None
    listed = value if type(value) is list else [value]
    return [_tool(tool, f"{place}[{index}]") for index, tool in enumerate(listed)]


def _tool(tool: Any, place: str) -> dict[str, Any]:
    if type(tool) is str:
        tool = parsed(tool, place, 81, "is no function as JSON")
    function = tool.get("function", tool) if type(tool) is dict else None
    if type(function) is not dict or type(function.get("name")) is not str:
        raise Fault(81, place, "is no function: it needs a name (and description and parameters)")
    return {"type": "function", "function": function}


def calls_of(value: Any, place: str) -> list[dict[str, Any]]:
    """Calls as data has them: a list, one object, or their JSON text; bare or wrapped in `function`."""
    if type(value) is str:
        value = parsed(value, place, 80, "is no function call as JSON")
    if value is None:
        return []
    listed = value if type(value) is list else [value]
    return [_call(call, f"{place}[{index}]" if type(value) is list else place) for index, call in enumerate(listed)]


def _call(call: Any, place: str) -> dict[str, Any]:
    if type(call) is str:
        call = parsed(call, place, 80, "is no function call as JSON")
    function = call.get("function", call) if type(call) is dict else None
    name = function.get("name") if type(function) is dict else None
    if type(function) is not dict or type(name) is not str or not name.strip():
        raise Fault(80, place, "is no function call: it needs a name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    if type(arguments) is str:
        inner = f"{place}.arguments"
        arguments = parsed(arguments, inner, 80, "is no JSON object") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if type(arguments) is not dict:
        raise Fault(80, f"{place}.arguments", f"is {in_words(arguments)}, not an object of named arguments")
    known = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**known, "id": call["id"]} if type(call.get("id")) is str else known


def looks_like_calls(text: str) -> bool:
    """Whether text is meant as JSON calls; other text, such as `f(x=1)`, is a call in words of its own."""
    start = text.lstrip()
    return start.startswith("{") or (start.startswith("[") and start[1:].lstrip().startswith("{"))


def call_as_text(call: dict[str, Any]) -> str:
    """One call as a line of JSON, as a model without tool support writes it."""
    return json.dumps(call["function"], ensure_ascii=False)


# --- for templates that know no tools ----------------------------------------------------------------------


def flattened(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[Message]:
    """The conversation with system, user and assistant only, for templates that cannot render tools.

    The functions are listed at the end of the system message (which is made if there is none), calls become JSON
    text in the assistant's content, and results the user's text. Neighbours of one role become one message.
    Messages without tools come back as they are; nothing is changed in place.
    """
    made: list[Message] = [_offer(messages, tools)] if tools else []
    rest = messages[1:] if tools and messages and messages[0]["role"] == "system" else messages
    for message in rest:
        plain = _plain(message)
        if made and made[-1]["role"] == plain["role"]:
            both = "\n".join(part for part in (made[-1]["content"], plain["content"]) if part)
            made[-1] = {**{k: v for k, v in made[-1].items() if k not in ("instruction", "input")}, "content": both}
        else:
            made.append(plain)
    return made


def _offer(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
    own = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return {"role": "system", "content": f"{own}\n\n{TOOLS_OFFERED}\n{listed}".lstrip("\n")}


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": message["content"]}
    if not message.get("tool_calls"):
        return message
    said = "\n".join(filter(None, [message["content"], *map(call_as_text, message["tool_calls"])]))
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": said}
