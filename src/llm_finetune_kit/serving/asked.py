"""What a chat request asks for, read strictly: what this server does not do is refused and never left out in silence."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.serving.exchange import Refusal

MOST_MESSAGES = 1024
MOST_STOPS = 4
LONGEST_STOP = 256  # characters
COLDEST = 1e-4  # a temperature below which scores overflow when divided by it: the likeliest token is taken
USUAL_TOKENS = 1024  # of an answer whose request names no limit, where the model's context has that much room

# Parameters of OpenAI's API that mean nothing here, with the value that asks for nothing.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "store": False,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "modalities": ["text"],
    "service_tier": "auto",
}
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # for the caller's own books


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] = Field(union_mode="left_to_right")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Options(_Strict):
    include_usage: bool = False


class _Request(_Strict):
    model: str
    messages: list[_Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = Field(default_factory=list, union_mode="left_to_right")
    stream: bool = False
    stream_options: _Options = _Options()

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, value: str | list[str]) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if len(stops) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in stops):
            raise ValueError(f"up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
        return stops


@dataclass(frozen=True)
class Asked:
    """A chat request that can be answered. `most_tokens` is None where the request names no limit."""

    model: str
    messages: list[dict[str, str]]
    most_tokens: int | None
    how: GenerationSection
    seed: int
    stops: list[str]
    stream: bool
    include_usage: bool


def read_request(body: bytes) -> Asked:
    """A request's body as what it asks. Raises Refusal (400) with the first thing that is wrong, and where."""
    from pydantic_core import from_json

    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise Refusal(400, "the body is not a JSON object", code="invalid_json")
    found = _understood(tree)
    if found.messages[-1].role == "assistant":
        raise Refusal(400, "the last message is the assistant's, and leaves nothing to answer", param="messages")
    both = {found.max_tokens, found.max_completion_tokens} - {None}
    if len(both) > 1:
        raise Refusal(400, "max_tokens and max_completion_tokens differ", param="max_tokens")
    roles = {"developer": "system"}
    return Asked(
        model=found.model,
        messages=[{"role": roles.get(one.role, one.role), "content": one.text} for one in found.messages],
        most_tokens=both.pop() if both else None,
        how=GenerationSection(temperature=found.temperature if found.temperature > COLDEST else 0.0, top_p=found.top_p),
        seed=secrets.randbits(62) if found.seed is None else found.seed,
        stops=list(found.stop),
        stream=found.stream,
        include_usage=found.stream_options.include_usage,
    )


def _understood(tree: dict[str, Any]) -> _Request:
    asking = {name: value for name, value in tree.items() if _asks(name, value)}
    messages = asking.get("messages")
    if isinstance(messages, list):  # answers that clients send back have empty fields for all that they might have held
        asking["messages"] = [
            {name: part for name, part in one.items() if part is not None and part != []} if isinstance(one, dict) else one
            for one in messages[: MOST_MESSAGES + 1]
        ]
    try:
        return _Request.model_validate(asking)
    except ValidationError as error:
        raise _refusal(error) from None


def _asks(name: str, value: Any) -> bool:
    empty = value is None or value == [] or value == {}
    neutral = name in NEUTRAL and type(value) in (type(NEUTRAL[name]), int, float) and value == NEUTRAL[name]
    return not (empty and name != "messages") and not neutral and name not in LABELS


def _refusal(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]", "list[_Part]"))
    if first["type"] == "extra_forbidden":
        problem, code = f"this server does not do {place[:80]}", "unsupported_parameter"
    elif first["type"] == "missing":
        problem, code = f"{place} is missing", "missing_required_parameter"
    else:
        problem, code = f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}", "invalid_value"
    return Refusal(400, problem, param=place[:80], code=code)
