"""From conversations to token ids, with a mask that says which tokens are learned.

The mask is computed, then verified: assistant contents are marked before the template is rendered, the
marks show where each answer lies in the rendered text, and the rendering without marks must be the same
text. An answer's end-of-turn token belongs to it. Text that looks like a special token inside a message
stays plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llm_finetune_kit.errors import DataError

# Marks of answers in rendered text, and what breaks up special-token text in messages: Unicode noncharacters,
# which no text holds.
BEGIN, END, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
PROBED = 32  # conversations whose character offsets are checked before they are trusted
CHUNK = 4096  # conversations rendered and tokenized at once: bounds memory, large enough to use all cores


class Renderer(Protocol):
    """What this module needs of `models.tokenizer.ChatTokenizer`."""

    backend: Any
    specials: dict[str, int]
    eos_id: int
    bos_id: int | None
    adds_bos: bool

    @property
    def respelled(self) -> tuple[Any, dict[str, str], dict[int, int]]: ...

    def render(self, conversations: list[list[dict[str, Any]]], *, ask: bool = False) -> list[str]: ...
    def stop_ids(self) -> list[int]: ...


@dataclass(frozen=True)
class Tokens:
    """All examples as flat arrays. Example i is `ids[starts[i]:starts[i + 1]]`; `rows[i]` is its source row."""

    ids: np.ndarray  # int32 [total]
    trained: np.ndarray  # bool [total]
    starts: np.ndarray  # int64 [examples + 1]
    rows: np.ndarray  # int32 [examples]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of one example, each of shape [length]."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.ids[span], self.trained[span]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]"""
        return np.diff(self.starts)

    @property
    def targets(self) -> np.ndarray:
        """Learned tokens of each example, int64 [examples]; a first token is never a target."""
        totals = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        first = self.trained[np.minimum(self.starts[:-1], max(0, len(self.trained) - 1))] if len(self) else 0
        targets: np.ndarray = np.diff(totals[self.starts]) - first
        return targets

    def select(self, indices: np.ndarray) -> Tokens:
        """These examples, in this order."""
        pieces = [self.example(int(index)) for index in indices]
        return _flatten([ids for ids, _ in pieces], [mask for _, mask in pieces], self.rows[indices])

    def cut(self, max_length: int) -> tuple[Tokens, int, int]:
        """Examples cut at the end to `max_length` tokens; with the number of examples and learned tokens cut."""
        too_long = self.lengths > max_length
        if not too_long.any():
            return self, 0, 0
        pieces = [self.example(index) for index in range(len(self))]
        shorter = _flatten([ids[:max_length] for ids, _ in pieces], [mask[:max_length] for _, mask in pieces], self.rows)
        return shorter, int(too_long.sum()), int(self.trained.sum() - shorter.trained.sum())


def _flatten(ids: list[Any], masks: list[Any], rows: Any) -> Tokens:
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in ids], out=starts[1:])
    flat_ids = np.concatenate([np.asarray(piece, dtype=np.int32) for piece in ids]) if ids else np.zeros(0, np.int32)
    flat_mask = np.concatenate([np.asarray(piece, dtype=bool) for piece in masks]) if ids else np.zeros(0, bool)
    return Tokens(flat_ids, flat_mask, starts, np.asarray(rows, dtype=np.int32))


def encode(examples: list[Any], chat: Renderer, *, loss_on: str = "answers") -> Tokens:
    """Tokens of `formats.Example`s: conversations by the chat template, raw texts as they are plus an end token.

    Raises DataError if the template does not show where the answers are.
    """
    pieces: list[tuple[list[int], np.ndarray]] = []
    rows: list[int] = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        talks = [example for example in chunk if example.messages is not None]
        encoded = _encode_talks([example.messages for example in talks], chat, loss_on == "all")
        for example in chunk:
            pieces.append(next(encoded) if example.messages is not None else _encode_text(example.text, chat))
            rows.append(example.row)
    return _flatten([ids for ids, _ in pieces], [mask for _, mask in pieces], rows)


def _encode_text(text: str, chat: Renderer) -> tuple[list[int], np.ndarray]:
    ids = [*_plain_ids(text, chat), chat.eos_id]
    if chat.adds_bos:
        ids = [chat.bos_id, *ids]  # type: ignore[list-item]
    return ids, np.ones(len(ids), dtype=bool)


def _plain_ids(text: str, chat: Renderer) -> list[int]:
    """Ids of a text in which nothing is a special token."""
    chat.backend.encode_special_tokens = True
    try:
        return list(chat.backend.encode(text, add_special_tokens=False).ids)
    finally:
        chat.backend.encode_special_tokens = False


@dataclass
class _Rendered:
    """A rendered conversation: its text, the character spans to learn, and whether text looks like special tokens."""

    text: str
    spans: list[tuple[int, int]]
    disguised: str | None = None  # the text with BREAK inside what only looks special


def _encode_talks(talks: list[list[dict[str, Any]]], chat: Renderer, learn_all: bool) -> Iterator[tuple[list[int], np.ndarray]]:
    if not talks:
        return
    special = re.compile("|".join(map(re.escape, sorted(chat.specials, key=len, reverse=True))) or r"(?!)")
    rendered = _render_marked(talks, chat, special, learn_all)
    encodings = chat.backend.encode_batch([talk.text for talk in rendered], add_special_tokens=False)
    trust_offsets = all(map(_covers, encodings[:PROBED], [talk.text for talk in rendered[:PROBED]]))
    for talk, encoding in zip(rendered, encodings, strict=True):
        if talk.disguised is not None:
            ids, mask = _encode_disguised(talk, chat, special, trust_offsets)
        else:
            ids = encoding.ids
            mask = _mask(talk.text, talk.spans, encoding, chat.backend, set(chat.specials.values()), trust_offsets)
        if chat.adds_bos and ids[:1] != [chat.bos_id]:
            ids, mask = [chat.bos_id, *ids], np.concatenate([[False], mask])  # type: ignore[list-item]
        yield ids, np.ones(len(ids), dtype=bool) if learn_all else mask


def _encode_disguised(
    talk: _Rendered, chat: Renderer, special: re.Pattern[str], trust_offsets: bool
) -> tuple[list[int], np.ndarray]:
    """Tokenize with the template's special tokens spelled otherwise, so that the same words in a message stay text."""
    backend, spellings, behind = chat.respelled
    text = special.sub(lambda match: spellings[match.group()], talk.disguised or "").replace(BREAK, "")
    encoding = backend.encode(text, add_special_tokens=False)
    control = {index for index, original in behind.items() if original in chat.specials.values()}
    mask = _mask(text, talk.spans, encoding, backend, control, trust_offsets)
    return [behind.get(index, index) for index in encoding.ids], mask


def _mask(
    text: str, spans: list[tuple[int, int]], encoding: Any, backend: Any, control: set[int], trust_offsets: bool
) -> np.ndarray:
    """Which tokens of a text lie in the character spans, bool [tokens]; `control` holds the ids of special tokens."""
    mask = np.zeros(len(encoding.ids), dtype=bool)
    for first, last in spans:
        if trust_offsets:
            begin = _token_at(encoding, first, last)
            if begin < len(mask) and encoding.ids[begin] in control and encoding.offsets[begin][0] < first:
                begin += 1  # a special token before the span that takes the white space to its right
            mask[begin : _token_after(encoding, last, first)] = True
        else:
            begin, _ = _shared(text[:first], encoding.ids, backend)
            end, torn = _shared(text[:last], encoding.ids, backend)
            mask[begin : end + torn] = True
    return mask


def _covers(encoding: Any, text: str) -> bool:
    """Whether the tokens' character offsets account for all of the text (tokenizers that drop characters lie)."""
    position = 0
    for first, last in encoding.offsets:
        if text[position:first].strip():
            return False
        position = max(position, last)
    return not text[position:].strip()


def _shared(beginning: str, ids: list[int], backend: Any) -> tuple[int, bool]:
    """How many of the ids the beginning of their text has too, and whether the next one reaches into both parts."""
    own = backend.encode(beginning, add_special_tokens=False).ids
    shared = next((place for place, (one, other) in enumerate(zip(own, ids, strict=False)) if one != other), len(own))
    return shared, shared < len(own)


def _token_at(encoding: Any, first: int, last: int) -> int:
    """Index of the token that holds the first character of a span that a token holds at all."""
    for position in range(first, last):
        token = encoding.char_to_token(position)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _token_after(encoding: Any, last: int, first: int) -> int:
    for position in range(last - 1, first - 1, -1):
        token = encoding.char_to_token(position)
        if token is not None:
            end = int(token) + 1
            while end < len(encoding.ids) and encoding.offsets[end] == encoding.offsets[end - 1]:
                end += 1  # one character may be several byte tokens
            return end
    return 0


def _render_marked(
    talks: list[list[dict[str, Any]]], chat: Renderer, special: re.Pattern[str], learn_all: bool
) -> list[_Rendered]:
    safe = [[_disguise(message, special) for message in talk] for talk in talks]
    plain = chat.render(safe)
    marked_talks = [[_mark(message) for message in talk] for talk in safe]
    marked = chat.render(marked_talks)
    prompts = chat.render([talk[: _last_answer(talk)] for talk in safe], ask=True)
    found = []
    for index, (text, with_marks, prompt) in enumerate(zip(plain, marked, prompts, strict=True)):
        answers = sum(one is not other for one, other in zip(safe[index], marked_talks[index], strict=True))
        spans = [] if learn_all else _spans(text, with_marks, answers, prompt, special)
        if spans is None:
            raise DataError(
                31,
                "the chat template does not show where this answer begins and ends",
                where=f"conversation {index + 1}",
                why="it drops or changes assistant messages, or their prompts once they are answered",
                fix="learn all tokens with data.loss_on=all, or use another chat template",
            )
        if BREAK in text:
            cleaned = [(a - text.count(BREAK, 0, a), b - text.count(BREAK, 0, b)) for a, b in spans]
            found.append(_Rendered(text.replace(BREAK, ""), cleaned, text))
        else:
            found.append(_Rendered(text, spans))
    return found


def _last_answer(talk: list[dict[str, Any]]) -> int:
    return max(index for index, message in enumerate(talk) if message["role"] == "assistant")


def _disguise(message: dict[str, Any], special: re.Pattern[str]) -> dict[str, Any]:
    if not any(special.search(value) for value in message.values() if isinstance(value, str)):
        return message
    hidden = {
        key: special.sub(lambda match: match.group()[0] + BREAK + match.group()[1:], value)
        for key, value in message.items()
        if key != "role" and isinstance(value, str)
    }
    return message | hidden


def _mark(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant message whose content is marked; outer white space stays outside, as templates trim it."""
    if message["role"] != "assistant" or message.get("train") is False:
        return message
    content = message["content"]
    core = content.strip()
    if not core:
        return message
    start = content.index(core)
    return message | {"content": f"{content[:start]}{BEGIN}{core}{END}{content[start + len(core) :]}"}


def _spans(text: str, marked: str, answers: int, prompt: str, special: re.Pattern[str]) -> list[tuple[int, int]] | None:
    """Character spans of `text` to learn, or None where the marks of its answers did not come through unharmed."""
    spans: list[tuple[int, int]] = []
    pieces = re.split(f"([{BEGIN}{END}])", marked)
    if "".join(pieces[::2]) != text or pieces[1::2] != [BEGIN, END] * answers:
        return None
    if not text.startswith(prompt):
        return None
    position = 0
    for before, _, answer, _ in zip(*[iter(pieces[:-1])] * 4, strict=True):
        first = position + len(before)
        position = first + len(answer)
        spans.append((first, _end_of_turn(text, position, special)))
    gap = text[len(prompt) : spans[-1][0]] if spans else ""
    if gap:  # what the model itself must write between prompt and answer: white space, an empty thought
        spans = [(a - len(gap), b) if text[:a].endswith(gap) else (a, b) for a, b in spans]
    return spans


def _end_of_turn(text: str, position: int, special: re.Pattern[str]) -> int:
    """Where an answer that ends at `position` is over: after the special token that closes it, if one does."""
    after = position
    while after < len(text) and text[after].isspace():
        after += 1
    match = special.match(text, after)
    return match.end() if match else position


@dataclass(frozen=True)
class MaskFacts:
    """What the gate knows about a set of tokens."""

    examples: int
    tokens: int
    target_tokens: int
    nothing_learned: np.ndarray  # indices of examples without a single target
    open_ended: int  # uncut answers whose last learned token does not end the turn
    double_bos: int


def inspect(tokens: Tokens, chat: Renderer) -> MaskFacts:
    """Facts about masks that decide whether training may start."""
    stops = np.asarray(chat.stop_ids())
    ends = tokens.starts[1:]
    targets = tokens.targets
    learned = np.flatnonzero(targets > 0)
    last_learned = np.full(len(tokens), -1, dtype=np.int64)
    for index in learned:
        ids, mask = tokens.example(int(index))
        last_learned[index] = ids[np.flatnonzero(mask)[-1]]
    double = 0
    if chat.bos_id is not None and chat.bos_id != chat.eos_id:
        long_enough = np.flatnonzero(tokens.lengths > 1)
        first = tokens.starts[:-1][long_enough]
        double = int(((tokens.ids[first] == chat.bos_id) & (tokens.ids[first + 1] == chat.bos_id)).sum())
    return MaskFacts(
        examples=len(tokens),
        tokens=int(ends[-1]) if len(tokens) else 0,
        target_tokens=int(targets.sum()),
        nothing_learned=np.flatnonzero(targets == 0),
        open_ended=int((~np.isin(last_learned[learned], stops)).sum()),
        double_bos=double,
    )
