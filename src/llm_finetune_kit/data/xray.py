"""The mask X-ray: real examples, token by token, as the training step computes them.

Whether a token is learned is read from the passes of `batches.make_passes`, what the loss is computed on, and not
from the mask that went in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llm_finetune_kit.data.masks import Tokens

State = Literal["trained", "context", "cut"]
PARTIAL = "·"  # stands for a token that is only a part of a character
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class XrayToken:
    """One token: its id, what it reads as, and whether it is learned, only read, or beyond the length limit."""

    id: int
    text: str
    state: State
    part: bool = False  # of a character that a later token shows


@dataclass(frozen=True)
class XrayExample:
    """One example; `row` is its source row, counted from 0."""

    row: int
    tokens: list[XrayToken]

    def count(self, state: State) -> int:
        return sum(token.state == state for token in self.tokens)

    def runs(self) -> list[tuple[State, str]]:
        """Neighbouring tokens of one state as one text, in which characters stand whole."""
        found: list[tuple[State, str]] = []
        for token in self.tokens:
            if token.part:
                continue
            if found and found[-1][0] == token.state:
                found[-1] = (token.state, found[-1][1] + token.text)
            else:
                found.append((token.state, token.text))
        return found


@dataclass(frozen=True)
class Totals:
    """Counts over a whole set; all but `cut_*` are of what remains within the length limit."""

    examples: int
    tokens: int
    trained: int  # tokens the loss is computed on
    cut_examples: int
    cut_tokens: int
    cut_trained: int

    @property
    def share(self) -> float:
        """Learned tokens among all that remain, 0 to 1."""
        return self.trained / self.tokens if self.tokens else 0.0


def totals(tokens: Tokens, cut_length: int) -> Totals:
    """Counts over all examples, cut to `cut_length` tokens each."""
    cut, examples, trained = tokens.cut(cut_length)
    return Totals(len(tokens), len(cut.ids), int(cut.targets.sum()), examples, len(tokens.ids) - len(cut.ids), trained)


def xray(tokens: Tokens, cut_length: int, chat: Any, indices: Sequence[int]) -> list[XrayExample]:
    """These examples as they are trained on when cut to `cut_length` tokens; `tokens` are uncut."""
    from llm_finetune_kit.data.batches import make_passes

    found = []
    for index in indices:
        ids, _ = tokens.example(int(index))
        cut, _, _ = tokens.select(np.array([index])).cut(cut_length)
        states: list[State] = ["context" if place < len(cut.ids) else "cut" for place in range(len(ids))]
        for computed in make_passes(cut, [0], max(1, len(cut.ids))):
            targets = np.flatnonzero(computed.keep[0].numpy()) + 1  # position t predicts token t + 1
            if ids[targets].tolist() != computed.labels.tolist():
                raise AssertionError("the labels of a pass are not the tokens after its kept positions")
            for target in targets:
                states[int(target)] = "trained"
        texts = token_texts(ids.tolist(), chat)
        shown = [XrayToken(int(one), text, state, part) for one, (text, part), state in zip(ids, texts, states, strict=True)]
        found.append(XrayExample(int(tokens.rows[index]), shown))
    return found


def token_texts(ids: list[int], chat: Any) -> list[tuple[str, bool]]:
    """What each token reads as, and whether it is a part of a character that a later token shows (it reads `·`)."""
    backend = chat.backend
    anchor = backend.encode("a", add_special_tokens=False).ids  # a decoder may trim white space at a text's start
    before = len(backend.decode(anchor, skip_special_tokens=False))

    def text_of(piece: list[int]) -> str:
        return str(backend.decode([*anchor, *piece], skip_special_tokens=False))[before:]

    texts: list[tuple[str, bool]] = []
    waiting = 0  # tokens before this one that are parts of a character
    for place, index in enumerate(ids):
        text = text_of([index])
        if REPLACEMENT in text:
            whole = text_of(ids[place - waiting : place + 1])
            if REPLACEMENT in whole:
                text, waiting = PARTIAL, waiting + 1
            else:
                texts[place - waiting :] = [(PARTIAL, True)] * waiting
                text, waiting = whole, 0
        else:
            waiting = 0
        texts.append((text, False))
    return texts
