"""Where the answers lie in a rendered conversation, as character spans: marked, found, and verified.

Three ways, the first that fits:

1. A template with generation marks says itself what it lets the model write.
2. Assistant contents are marked before the template is rendered; the rendering without marks must be the same
   text, and must begin with what the model is asked with.
3. Conversations with thoughts or calls, whose contents a template takes apart: an answer begins where the
   conversation up to it, rendered as a question, habits. What lies there must be the answer, closed by an end token.

Text in messages that looks like a special token is broken up first, so no message can fake an end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llm_finetune_kit.data.formats.tools import flattened
from llm_finetune_kit.data.renderer import Renderer, Talk
from llm_finetune_kit.errors import ModelError

BEGIN, END = "\ufdd0", "\ufdd1"  # marks of answers in rendered text: noncharacters, which no text holds
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\n*")
THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)

UNCLEAR = "the chat template does not show where its answers begin and end"


@dataclass
class Rendered:
    """A rendered conversation: its text, the character spans to learn, and whether text looks like special tokens."""

    text: str
    spans: list[tuple[int, int]]
    disguised: str | None = None  # the text with BREAK inside what only looks special


@dataclass(frozen=True)
class Refused:
    """A conversation that cannot be rendered or whose answers cannot be told: the error's number and why."""

    number: int  # 31 the answers cannot be told, 120 the template refuses it
    reason: str


def for_template(messages: Talk, tools: Any, chat: Renderer) -> tuple[Talk, Any]:
    """A conversation and its tools as the template can render them; as they are where it can render them so."""
    if (tools or any("tool_calls" in message or message["role"] == "tool" for message in messages)) and not chat.can.tools:
        messages, tools = flattened(messages, tools), None
    return chat.shaped(messages), tools


def render_all(talks: list[tuple[Talk, Any]], chat: Renderer, *, learn_all: bool = False) -> list[Rendered | Refused]:
    """Text and spans of each conversation (messages, tools), in their order."""
    ready = []
    for messages, tools in talks:
        messages, tools = for_template(messages, tools, chat)
        ready.append(([chat.disguised(message) for message in messages], chat.disguised(tools)))
    plain = [place for place, (messages, tools) in enumerate(ready) if not tools and _is_plain(messages, chat)]
    habits = _Habits(chat)
    found: dict[int, Rendered | Refused] = {}
    marked = _by_marks([ready[place][0] for place in plain], chat, habits, learn_all)
    for place, rendered in zip(plain, marked, strict=True):
        if rendered is not None:
            found[place] = rendered
    for place, (messages, tools) in enumerate(ready):
        if place not in found:
            found[place] = _one_by_one(messages, tools, chat, habits, learn_all)
    return [found[place] for place in range(len(ready))]


def _is_plain(messages: Talk, chat: Renderer) -> bool:
    """Whether the first way to find the answers is the one with marks in their contents."""
    if chat.marks_answers:
        return False
    for message in messages:
        if message["role"] == "tool" or "tool_calls" in message or "reasoning_content" in message:
            return False
        if message["role"] == "assistant" and "</think>" in message["content"]:
            return False
    return True


class _Habits:
    """How a template frames an answer: what stands between prompt and words, and between words and the next turn."""

    def __init__(self, chat: Renderer) -> None:
        stops = [re.escape(text) for text, index in chat.specials.items() if index in chat.stop_ids()]
        special = chat.special_text.pattern
        stop = "|".join(sorted(stops, key=len, reverse=True))
        self._stop = re.compile(rf"\s*(?:{stop})(?:\s+(?={special}|\Z))?") if stops else re.compile(r"(?!)")
        self._rest = re.compile(rf"\s*(?:{stop})(?:\s|{stop})*\Z") if stops else re.compile(r"(?!)")
        asked = {"role": "user", "content": "a"}
        plain, padded = chat.render([[asked, {"role": "assistant", "content": text}] for text in ("zq", " \tzq")])
        closed = self._stop.match(plain.rpartition("zq")[2])
        self._white = bool(closed and closed.group()[-1].isspace())  # else white space after it begins the next turn
        prompt = chat.render([[asked]], ask=True)[0]
        gap = plain[len(prompt) :].partition("zq")[0] if plain.startswith(prompt) else ""
        self._gap = EMPTY_THOUGHT.sub("", gap)
        self._keeps = padded.partition("zq")[0] == plain.partition("zq")[0] + " \t"

    def before(self, message: dict[str, Any]) -> str:
        """What the model itself must write before the words of an answer: white space of the template and its own."""
        content = message["content"]
        return self._gap + (content[: len(content) - len(content.lstrip())] if self._keeps else "")

    def after(self, text: str, position: int) -> int | None:
        """Where an answer whose words end at `position` is over: None where no end token closes it."""
        match = self._rest.match(text, position) or self._stop.match(text, position)
        if match is None:
            return None
        return match.end() if self._white else position + len(match.group().rstrip())

    def following(self, text: str, position: int) -> int | None:
        """The same for words that end somewhere after `position`: up to the first end token there."""
        match = self._stop.search(text, position)
        return self.after(text, match.start()) if match else None


# --- marks in the contents ---------------------------------------------------------------------------------


def _by_marks(talks: list[Talk], chat: Renderer, habits: _Habits, learn_all: bool) -> Iterator[Rendered | Refused | None]:
    """None where the marks did not come through; conversations are rendered all at once."""
    if not talks:
        return
    texts = _rendered(talks, chat)
    marked_talks = [[_mark(message) for message in talk] for talk in talks]
    if learn_all:
        marked = prompts = texts
    else:
        marked = _rendered(marked_talks, chat)
        prompts = _rendered([talk[: _last_answer(talk)] for talk in talks], chat, ask=True)
    for talk, marked_talk, text, with_marks, prompt in zip(talks, marked_talks, texts, marked, prompts, strict=True):
        if isinstance(text, ModelError):
            yield Refused(120, text.problem)
        elif learn_all:
            yield _told(text, [], chat)
        elif isinstance(with_marks, ModelError) or isinstance(prompt, ModelError):
            yield None
        else:
            answers = [habits.before(one) for one, other in zip(talk, marked_talk, strict=True) if one is not other]
            spans = _spans(text, with_marks, answers, prompt, habits)
            yield None if spans is None else _told(text, spans, chat)


def _rendered(talks: list[Talk], chat: Renderer, *, ask: bool = False) -> list[Any]:
    """Each talk as text, or the ModelError with which the template refuses it."""
    if all(talks):
        try:
            return list[Any](chat.render(talks, ask=ask))
        except ModelError:
            pass
    found: list[Any] = []
    for talk in talks:  # one of them is refused: which
        try:
            found.append(chat.render([talk], ask=ask)[0])
        except ModelError as error:
            found.append(error)
    return found


def _told(text: str, spans: list[tuple[int, int]], chat: Renderer) -> Rendered:
    """Without what breaks up special-token text; spans counted without it."""
    if chat.BREAK not in text:
        return Rendered(text, spans)
    cleaned = [(a - text.count(chat.BREAK, 0, a), b - text.count(chat.BREAK, 0, b)) for a, b in spans]
    return Rendered(text.replace(chat.BREAK, ""), cleaned, text)


def _last_answer(talk: Talk) -> int:
    return max(index for index, message in enumerate(talk) if message["role"] == "assistant")


def _learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("train") is not False


def _mark(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant message whose content is marked; outer white space stays outside, as templates trim it."""
    if not _learned(message):
        return message
    content = message["content"]
    core = content.strip()
    if not core:
        return message
    start = content.index(core)
    return message | {"content": f"{content[:start]}{BEGIN}{core}{END}{content[start + len(core) :]}"}


def _spans(text: str, marked: str, before: list[str], prompt: str, habits: _Habits) -> list[tuple[int, int]] | None:
    """Character spans of `text` to learn, or None where the marks of its answers did not come through unharmed.

    `before` is what the model itself must write before the words of each answer; the last one's is told by the prompt.
    """
    pieces = re.split(f"([{BEGIN}{END}])", marked)
    if "".join(pieces[::2]) != text or pieces[1::2] != [BEGIN, END] * len(before):
        return None
    if not text.startswith(prompt):
        return None
    spans: list[tuple[int, int]] = []
    position = 0
    for lead, between, answer in zip(before, pieces[::4], pieces[2::4], strict=False):
        first = position + len(between)
        position = first + len(answer)
        own = len(lead) if text[:first].endswith(lead) else 0
        if first >= len(prompt):
            gap = text[len(prompt) : first]
            empty = EMPTY_THOUGHT.match(gap)
            own = len(gap) - (empty.end() if empty else 0)
        spans.append((first - own, habits.after(text, position) or position))
    return spans


# --- conversations that a template takes apart -------------------------------------------------------------


def _one_by_one(messages: Talk, tools: Any, chat: Renderer, habits: _Habits, learn_all: bool) -> Rendered | Refused:
    try:
        if chat.marks_answers and not learn_all:
            text, spans = _by_template(messages, tools, chat)
        else:
            text = chat.render([messages], tools=tools)[0]
            spans = [] if learn_all else _by_prompts(text, messages, tools, chat, habits)
    except ModelError as error:
        return Refused(120, error.problem)
    return Refused(31, UNCLEAR) if spans is None else _told(text, spans, chat)


def _by_template(messages: Talk, tools: Any, chat: Renderer) -> tuple[str, list[tuple[int, int]] | None]:
    """What the template's own generation marks hold, less the answers that are not to be learned."""
    text, spans = chat.render_answers(messages, tools)
    if all(_learned(message) for message in messages if message["role"] == "assistant"):
        return text, spans
    left_out = [_mark({**message, "train": True}) if message.get("train") is False else message for message in messages]
    marked, marked_spans = chat.render_answers(left_out, tools)
    if marked.replace(BEGIN, "").replace(END, "") != text or len(marked_spans) != len(spans):
        return text, None
    kept = [span for span, (a, b) in zip(spans, marked_spans, strict=True) if BEGIN not in marked[a:b]]
    return text, kept


def _by_prompts(text: str, messages: Talk, tools: Any, chat: Renderer, habits: _Habits) -> list[tuple[int, int]] | None:
    """An answer begins where the conversation up to it, asked, ends; the text there must be the answer and its end."""
    starts = _starts(text, messages, tools, chat)
    if starts is None:
        return None
    spans: list[tuple[int, int]] = []
    for index, start in starts.items():
        if empty := EMPTY_THOUGHT.match(text, start):
            start = empty.end()
        end = _end(text, start, messages[index], habits)
        if end is None or (spans and start < spans[-1][1]):
            return None
        if _learned(messages[index]):
            spans.append((start, end))
    return spans


def _starts(text: str, messages: Talk, tools: Any, chat: Renderer) -> dict[int, int] | None:
    """Where each assistant message begins in the text, by its index."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers[0] == 0:
        return None
    prompts = [chat.render([messages[:index]], ask=True, tools=tools)[0] for index in answers]
    if all(map(text.startswith, prompts)):
        return {index: len(prompt) for index, prompt in zip(answers, prompts, strict=True)}
    # A template may render earlier turns otherwise once there are later ones: then all from the end of the message
    # before an answer to the answer must be the same. Plain conversations leave no reason for that.
    if (not tools and _is_plain(messages, chat)) or any(one + 1 == other for one, other in pairwise(answers)):
        return None
    marked = [_end_marked(message) if index + 1 in answers else message for index, message in enumerate(messages)]
    pieces = chat.render([marked], tools=tools)[0].split(END)
    if "".join(pieces) != text or len(pieces) != len(answers) + 1:
        return None
    starts, position = {}, 0
    for index, piece, following in zip(answers, pieces, pieces[1:], strict=False):
        position += len(piece)
        asked = chat.render([marked[:index]], ask=True, tools=tools)[0].rpartition(END)[2]
        if not following.startswith(asked):
            return None
        starts[index] = position + len(asked)
    return starts


def _end_marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    end = len(content.rstrip())
    return message | {"content": content[:end] + END + content[end:]}


def _end(text: str, start: int, message: dict[str, Any], habits: _Habits) -> int | None:
    """Where the answer that begins at `start` is over; None if something else stands there."""
    thought = THOUGHT.match(text, start)
    words = message["content"].rpartition("</think>")[2].strip()
    whole = message["content"].strip()
    for position, core in ((thought.end() if thought else start, words), (start, whole)):
        while position < len(text) and text[position].isspace():
            position += 1
        if text.startswith(core, position):
            break
    else:
        return None
    if not message.get("tool_calls"):
        return habits.after(text, position + len(core))
    end = habits.following(text, position + len(core))
    if end is None or not all(call["function"]["name"] in text[position:end] for call in message["tool_calls"]):
        return None
    return end
