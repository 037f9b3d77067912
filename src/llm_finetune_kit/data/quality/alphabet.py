"""Characters that a tokenizer drops without a word: the model can then neither read nor write them.

Byte-level tokenizers are made to know every byte, but the vocabularies of some small ones leave bytes out. Each different
character is encoded and decoded between two letters; whatever stands there afterwards, be it another character, counts as kept:
tokenizers that fold case, accents or widths drop nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

NO_LOSS = ("C", "M", "Z")  # categories of Unicode that normalising may leave out: controls, marks and spaces
BETWEEN = "a"
SHOWN = 12  # characters that are named


def dropped_characters(texts: Iterable[str], chat: Any) -> tuple[str, list[int]]:
    """Characters of the texts that are gone after encoding and decoding, the commonest first, and the texts that hold any.

    Those that become the unknown token are not among them.
    """
    holding: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        for character in set(text):
            holding.setdefault(character, []).append(index)
    seen = [character for character in holding if unicodedata.category(character)[0] not in NO_LOSS]
    encoded = chat.backend.encode_batch([f"{BETWEEN}{one}{BETWEEN}" for one in seen], add_special_tokens=False)
    unknown = getattr(chat.tokenizer, "unk_token_id", None)
    gone = [
        one
        for one, encoding in zip(seen, encoded, strict=True)
        if unknown not in encoding.ids and "".join(chat.decode(encoding.ids).split()) in (2 * BETWEEN, "")
    ]
    gone.sort(key=lambda one: (-len(holding[one]), one))
    return "".join(gone), sorted({index for one in gone for index in holding[one]})


def named(characters: str) -> str:
    """The first of the characters, for a sentence."""
    more = len(characters) - SHOWN
    return " ".join(characters[:SHOWN]) + (f" and {more} more" if more > 0 else "")
