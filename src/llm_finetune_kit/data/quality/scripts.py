"""Which script a text is mostly written in, by the Unicode blocks of its letters."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from functools import lru_cache

SEEN = 500  # characters of a text that are looked at

# First code point of each stretch of blocks, and the script that its letters belong to.
STRETCHES = (
    (0x0000, "Latin"), (0x0370, "Greek"), (0x0400, "Cyrillic"), (0x0530, "Armenian"), (0x0590, "Hebrew"), (0x0600, "Arabic"),
    (0x0700, "other"), (0x0750, "Arabic"), (0x0780, "other"), (0x08A0, "Arabic"), (0x0900, "Devanagari"), (0x0980, "Bengali"),
    (0x0A00, "other"), (0x0B80, "Tamil"), (0x0C00, "Telugu"), (0x0C80, "other"), (0x0E00, "Thai"), (0x0E80, "other"),
    (0x10A0, "Georgian"), (0x1100, "Korean"), (0x1200, "Ethiopic"), (0x13A0, "other"), (0x1E00, "Latin"), (0x1F00, "Greek"),
    (0x2000, "other"), (0x2C60, "Latin"), (0x2C80, "other"), (0x2E80, "Chinese or Japanese"), (0x3130, "Korean"),
    (0x3190, "Chinese or Japanese"), (0xA000, "other"), (0xAC00, "Korean"), (0xD7B0, "other"), (0xF900, "Chinese or Japanese"),
    (0xFB00, "Latin"), (0xFB1D, "Hebrew"), (0xFB50, "Arabic"), (0xFE00, "other"), (0xFF21, "Latin"),
    (0xFF66, "Chinese or Japanese"), (0xFFA0, "Korean"), (0xFFDD, "other"), (0x20000, "Chinese or Japanese"), (0x40000, "other"),
)  # fmt: skip
_STARTS = [start for start, _ in STRETCHES]


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    return STRETCHES[bisect_right(_STARTS, ord(character)) - 1][1] if character.isalpha() else ""


def main_script(text: str) -> str:
    """The script of most letters near the beginning of the text; nothing where it has no letters."""
    text = text[:SEEN]
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else ""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        counts[_script(character)] += count
    del counts[""]
    return max(counts, key=counts.__getitem__) if counts else ""
