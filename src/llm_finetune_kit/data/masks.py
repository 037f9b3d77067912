"""From conversations to token ids, with a mask that says which tokens are learned.

`spans` says which characters of a rendered conversation are learned; this module says which tokens they are.
An answer's end-of-turn token belongs to it. Text that looks like a special token inside a message stays plain text.
"""

# Faults of this module and of gate.py:
#
#   31  answers cannot be told       34  too much cut          122  learned tokens are not the answers
#   32  two BOS                      35  nothing to learn
#   33  ends are not learned        120  the template refuses a conversation

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_finetune_kit.data import spans
from llm_finetune_kit.data.renderer import Renderer as Renderer
from llm_finetune_kit.data.spans import Refused, Rendered
from llm_finetune_kit.errors import DataError

PROBED = 32  # conversations whose character offsets are checked before they are trusted
CHUNK = 4096  # conversations rendered and tokenized at once: bounds memory, large enough to use all cores


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


def encode(
    examples: list[Any],
    chat: Renderer,
    *,
    loss_on: str = "answers",
    place: Callable[[int], str] | None = None,
    refused: list[tuple[int, str]] | None = None,
) -> Tokens:
    """Tokens of `formats.Example`s: conversations by the chat template, raw texts as they are plus an end token.

    Raises DataError, with the `place` of the row, if the template refuses a conversation or does not show where
    its answers are. With a list for `refused`, such rows (row and reason) are added to it and left out instead.
    """
    pieces: list[tuple[Any, np.ndarray]] = []
    rows: list[int] = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        talks = [(example.messages, example.tools) for example in chunk if example.messages is not None]
        encoded = _encode_talks(talks, chat, loss_on == "all")
        for example in chunk:
            made = next(encoded) if example.messages is not None else _encode_text(example.text, chat)
            if not isinstance(made, Refused):
                pieces.append(made)
                rows.append(example.row)
            elif refused is not None:
                refused.append((example.row, made.reason))
            else:
                raise _refusal(made, place(example.row) if place else f"row {example.row + 1}")
    return _flatten([ids for ids, _ in pieces], [mask for _, mask in pieces], rows)


def _refusal(found: Refused, where: str) -> DataError:
    if found.number == 120:
        fix = "correct the roles or remove the row, or use another template: data.template=default"
        return DataError(120, found.reason, where=where, fix=fix)
    return DataError(
        131,
        found.reason,
        where=where,
        why="it drops or changes assistant messages, or their prompts once they are answered",
        fix="learn all tokens with data.loss_on=all, or use another chat template, such as data.template=default",
    )


def notes(examples: list[Any], chat: Renderer) -> list[str]:
    """What is rendered otherwise than it stands in the data, because the template does not know it, and how often."""
    talks = [example for example in examples if example.messages is not None]
    systems = sum(example.messages[0]["role"] == "system" for example in talks)
    called = sum(
        bool(example.tools) or any(m["role"] == "tool" or "tool_calls" in m for m in example.messages) for example in talks
    )
    thoughts = sum(any("reasoning_content" in m for m in example.messages) for example in talks)
    found = []
    if systems and not chat.can.system:
        found.append(
            f"the chat template has no system role: the system prompt of {systems:,} conversations stands at the head of "
            "their first user message"
        )
    if called and not chat.can.tools:
        found.append(f"the chat template has no tools: functions, calls and results of {called:,} conversations are plain text")
    if thoughts and not chat.can.thoughts:
        found.append(f"the chat template has no thoughts: those of {thoughts:,} conversations stand between <think> marks")
    return found


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


def _encode_talks(
    talks: list[tuple[Any, Any]], chat: Renderer, learn_all: bool
) -> Iterator[tuple[list[int], np.ndarray] | Refused]:
    if not talks:
        return
    rendered = spans.render_all(talks, chat, learn_all=learn_all)
    texts = [talk.text for talk in rendered if isinstance(talk, Rendered)]
    encodings = iter(chat.backend.encode_batch(texts, add_special_tokens=False))
    trust_offsets = all(_covers(chat.backend.encode(text, add_special_tokens=False), text) for text in texts[:PROBED])
    control = set(chat.specials.values())
    for talk in rendered:
        if isinstance(talk, Refused):
            yield talk
            continue
        encoding = next(encodings)
        if talk.disguised is not None:
            ids, mask = _encode_disguised(talk, chat, trust_offsets)
        else:
            ids, mask = encoding.ids, _mask(talk.text, talk.spans, encoding, chat.backend, control, trust_offsets)
        if chat.adds_bos and ids[:1] != [chat.bos_id]:
            ids, mask = [chat.bos_id, *ids], np.concatenate([[False], mask])  # type: ignore[list-item]
        yield ids, np.ones(len(ids), dtype=bool) if learn_all else mask


def _encode_disguised(talk: Rendered, chat: Renderer, trust_offsets: bool) -> tuple[list[int], np.ndarray]:
    """Tokenize with the template's special tokens spelled otherwise, so that the same words in a message stay text."""
    backend, _, behind = chat.respelled
    text = chat.respell(talk.disguised or "")
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
