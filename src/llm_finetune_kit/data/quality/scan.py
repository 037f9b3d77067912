"""One pass over all texts for what can be told from a text alone: broken encodings, secrets, placeholders, markup."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from llm_finetune_kit.data.quality import junk, secrets
from llm_finetune_kit.data.quality.findings import SHOWN
from llm_finetune_kit.data.similar import said

TOGETHER = 200  # examples searched at once: most patterns are in none of them

PLACEHOLDER = re.compile(
    r"\{\{ ?[A-Za-z_][\w .]{0,40}\}\}|\bTODO\b|\bFIXME\b|\b[Ll]orem [Ii]psum\b|<(?:insert|your)[ _-][^<>\n]{1,40}>"
)
BLANK = re.compile(r"\[(?:your|insert|name|company|date|recipient|sender|address|city)\b[^\[\]\n]{0,40}\]", re.IGNORECASE)
BOILERPLATE = re.compile(
    r"\b[Aa]s an? (?:AI|artificial intelligence)(?:,| (?:language )?model\b| assistant\b)|\bI(?:'m| am) an AI language model"
)


@dataclass(frozen=True)
class Search:
    """A pattern, what must be somewhere in the text for it to match, and what it is looked for in."""

    kind: str
    pattern: re.Pattern[str]
    needs: tuple[str, ...] = ()  # one of these is in every match
    beyond_ascii: bool = False
    answers_only: bool = False
    name: str = ""  # of a secret; what was found is then shown masked
    holds: Callable[[str], bool] = bool  # what must be true of the whole text


@dataclass(frozen=True)
class Hits:
    """Examples in which something was found, as their indices in order, and remarks on the first of them."""

    examples: list[int]
    remarks: list[str]


def searches() -> tuple[Search, ...]:
    """All that is looked for in texts."""
    return (
        Search("mojibake", junk.MOJIBAKE, tuple(junk.FIRST), beyond_ascii=True),
        Search("lost_characters", junk.REPLACED, beyond_ascii=True),
        Search("control_characters", junk.CONTROL),
        Search("invisible_characters", junk.INVISIBLE, beyond_ascii=True),
        Search("markup", junk.ENTITY, ("&",), holds=junk.is_markup),
        Search("markup", junk.TAG, ("<",), holds=junk.is_markup),
        Search("personal_data", secrets.EMAIL, ("@",), name="e-mail address"),
        Search("personal_data", secrets.PHONE, name="phone number"),
        Search("placeholders", PLACEHOLDER, ("{{", "TODO", "FIXME", "orem ", "<insert", "<your")),
        Search("blanks_to_fill", BLANK, ("[",), answers_only=True),
        Search("boilerplate", BOILERPLATE, ("an AI", "a AI", "artificial"), answers_only=True),
        *(Search("secrets", pattern, name=name) for name, pattern in secrets.shapes()),
    )


def scan(examples: Sequence[Any]) -> dict[str, Hits]:
    """What was found in the messages or texts of the examples, by kind of finding."""
    found: dict[str, set[int]] = {}
    remarks: dict[tuple[str, int], str] = {}
    looked_for = searches()
    for start in range(0, len(examples), TOGETHER):
        chunk = examples[start : start + TOGETHER]
        everything = [_everything(example) for example in chunk]
        answers = [_answers(example) for example in chunk]
        for answers_only, texts in ((False, everything), (True, answers)):
            joined = "\n".join(texts)
            ends = list(accumulate(len(text) + 1 for text in texts))
            for search in looked_for:
                if search.answers_only == answers_only:
                    for place, remark in _found(search, joined, ends, texts):
                        found.setdefault(search.kind, set()).add(start + place)
                        remarks.setdefault((search.kind, start + place), remark)
    return {kind: Hits(rows := sorted(places), [remarks[kind, row] for row in rows[:SHOWN]]) for kind, places in found.items()}


def _found(search: Search, joined: str, ends: list[int], texts: list[str]) -> Iterator[tuple[int, str]]:
    """The texts in which something is, by their place in the chunk, with what it is."""
    if search.beyond_ascii and joined.isascii():
        return
    if search.needs and not any(word in joined for word in search.needs):
        return
    for match in search.pattern.finditer(joined):
        place = bisect_right(ends, match.start())
        if search.holds(texts[place]):
            yield place, _remark(search, match.group())


def _remark(search: Search, found: str) -> str:
    if search.name:
        return f"{search.name} {secrets.masked(found.strip())}"
    return found[:40] if found.isprintable() and search.kind != "invisible_characters" else f"U+{ord(found[0]):04X}"


def _everything(example: Any) -> str:
    if example.messages is None:
        return str(example.text)
    return "\n".join(said(message) for message in [*example.messages, *(example.rejected or [])])


def _answers(example: Any) -> str:
    if example.messages is None:
        return ""
    return "\n".join(said(message) for message in example.messages if message["role"] == "assistant")
