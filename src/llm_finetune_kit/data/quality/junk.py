"""Traces of broken encodings in text, and their repair where it is certain."""

from __future__ import annotations

import re

# UTF-8 read as Windows-1252: a first byte (shown as a letter) and the bytes after it (shown as these characters).
_AFTER = (
    "[\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d"
    "\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
)
# Single letters with accents, then punctuation and emoji, then whole words in Greek, Cyrillic, Hebrew, Arabic or Chinese: a
# lone "É»" or "Ð°" may be meant, a row of them is not.
MOJIBAKE = re.compile(
    f"(?:[\u00c2\u00c3]{_AFTER}|\u00e2[\u0080-\u00bf\u20ac\u201a\u201e\u2020\u2021\u02c6\u0153]{_AFTER}|\u00ef[\u00bb\u00bf]{_AFTER}|\u00f0{_AFTER}{{3}})+"
    f"|(?:[\u00ce-\u00d1\u00d7-\u00db]{_AFTER}){{3,}}|(?:[\u00e3-\u00e9]{_AFTER}{{2}}){{2,}}"
)
# One of these is in every match.
FIRST = "".join(map(chr, (0xC2, 0xC3, 0xE2, 0xEF, 0xF0, *range(0xCE, 0xD2), *range(0xD7, 0xDC), *range(0xE3, 0xEA))))
REPLACED = re.compile("\ufffd")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # joiners (200c, 200d) and marks of direction are part of some scripts
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|copy|reg|eacute|#\d{2,5}|#x[0-9a-fA-F]{2,5});")
TAG = re.compile(
    r"</?(?:p|br|div|span|font|strong|em|b|i|u|a|ul|ol|li|table|tr|td|h[1-6]|img)(?:\s[^<>\n=]{0,80}=[^<>\n]{0,200})?\s?/?>",
    re.IGNORECASE,
)
# Where the talk is of markup, or code is shown, tags and entities are meant.
MARKUP_MEANT = re.compile(
    r"html|xml|css|markup|javascript|\bjs\b|php|jsx|react|web ?page|website|```|<!doctype|<\?|\btags?\b", re.IGNORECASE
)

_BREAKS = str.maketrans({"\x0b": "\n", "\x0c": "\n", "\x85": "\n"})  # controls that part lines; the others vanish
_CP1252 = {character: byte for byte in range(256) for character in [bytes([byte]).decode("cp1252", "ignore") or chr(byte)]}


def is_markup(text: str) -> bool:
    """Whether the text holds leftovers of a web page although it is not about markup."""
    return bool((ENTITY.search(text) or TAG.search(text)) and not MARKUP_MEANT.search(text))


def repaired(text: str) -> str:
    """The text with certain damage undone: mojibake that reads as UTF-8, control and invisible characters.

    U+FFFD stands for what is lost and markup may be meant, so both stay.
    """
    if text.isascii() and text.isprintable():
        return text
    for _ in range(3):  # some texts went through it more than once
        better = MOJIBAKE.sub(_reread, text)
        if better == text:
            break
        text = better
    return INVISIBLE.sub("", CONTROL.sub("", text.translate(_BREAKS)))


def _reread(match: re.Match[str]) -> str:
    """What the bytes meant, if they are UTF-8 and nothing else."""
    try:
        meant = bytes(_CP1252[character] for character in match.group()).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return match.group()
    return meant
