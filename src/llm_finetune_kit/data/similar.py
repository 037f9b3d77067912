"""Which texts are copies of each other, word for word or nearly, in time linear in their number.

A text is compared as the set of its shingles: all pairs of words in a row, after Unicode NFKC and case folding. How
alike two texts are is the Jaccard similarity of their sets: shared shingles by all shingles. Two words and not more:
in a row of twenty words that differs in one of them, 17 of 21 pairs are shared (0.81) but only 15 of 21 triples (0.71).

A sketch holds the smallest hash of the set under 64 hash functions (MinHash), so the share of equal entries estimates
the similarity. Texts that share one of 16 bands of four entries become candidates. What copies.py reports is verified
on the shingles themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, pairwise
from typing import Any

import numpy as np

PERMUTATIONS = 64
BANDS, ROWS = 16, 4  # a pair of similarity 0.8 shares a band with probability 0.9998, one of 0.7 with 0.99
CHUNK = 4096  # texts hashed at once; small enough to stay in the processor's cache
NEIGHBOURS = 3  # rows before it, in the order of a band, that a row is compared with
MOST_WORDS = 1 << 20  # distinct words whose hashes are remembered

# Scripts without spaces between words: each character counts as a word. Of the marks, those that only structure
# sentences are left out; `+`, `*`, `=` and the like tell two sums apart.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(
    rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s.,;:!?'\"()\[\]{{}}`_\-\u2010-\u2015\u2018-\u201f\u3001\u3002\uff0c\u2026]"
)


def text_of(example: Any) -> str:
    """What is compared of a `formats.Example`: its text, or all messages in order, worse answers and label included.

    The system message is left out: one that stands in every row would make all rows alike.
    """
    if example.messages is None:
        return str(example.text)
    messages = [*example.messages, *(example.rejected or [])]
    parts = [said(message) for message in messages if message["role"] != "system"]
    if example.label is not None:
        parts.append("good" if example.label else "bad")
    return "\n".join(parts)


def said(message: dict[str, Any]) -> str:
    """All that a message says: its content, and its tool calls as text."""
    content = message.get("content") or ""
    return f"{content}\n{message['tool_calls']}" if message.get("tool_calls") else str(content)


def answers_of(example: Any) -> str:
    """All that the assistant says in an example; a plain text is its own answer."""
    if example.messages is None:
        return str(example.text)
    return "\n".join(said(message) for message in example.messages if message["role"] == "assistant")


class Texts(Sequence[str]):
    """A text of each example, made when asked for: a million of them are never held at once."""

    def __init__(self, examples: Sequence[Any], make: Callable[[Any], str] = text_of) -> None:
        self.examples, self.make = examples, make

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.make(example) for example in self.examples[index]]
        return self.make(self.examples[index])


def words(text: str) -> list[str]:
    """The words of a text in one spelling: NFKC, case folded, without marks that structure sentences."""
    return WORD.findall(_folded(text))


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The shingles themselves: the pairs of words, or the one word there is, or the characters where there is none."""
    found = words(text) or [_folded(text).strip()]
    return frozenset(pairwise(found)) if len(found) > 1 else frozenset([(found[0],)])


def similarity(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Jaccard similarity of two sets that are not both empty."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


# --- sketches ----------------------------------------------------------------------------------------------


class _Hashes(dict[str, int]):
    """Hash of each word, the same on every machine."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        self[word] = value = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        return value


_hashes = _Hashes()
_MULTIPLIERS = np.random.Generator(np.random.PCG64(20_240_607)).integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles of some texts, uint64 [total], and where each text's begin, int64 [texts + 1].

    A text of one word has that word, and one of no words its characters, as its only shingle.
    """
    found = [words(text) or [_folded(text).strip()] for text in texts]
    counts = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
    ends = np.cumsum(counts)
    flat = np.fromiter(map(_hashes.__getitem__, chain.from_iterable(found)), dtype=np.uint64, count=int(ends[-1]) if found else 0)
    second = np.zeros_like(flat)
    second[:-1] = flat[1:]
    last = ends - 1
    second[last] = 0
    hashes = _mixed(flat + second * np.uint64(0x9E3779B97F4A7C15))
    keep = np.ones(len(flat), dtype=bool)
    keep[last[counts > 1]] = False  # a last word begins no pair, unless it is the only word
    return hashes[keep], np.concatenate([[0], np.cumsum(np.maximum(1, counts - 1))])


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread over all 64 bits (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def sketch(texts: Sequence[str]) -> np.ndarray:
    """MinHash sketches, uint16 [texts, 64]: the share of equal entries of two rows estimates their similarity."""
    found = np.empty((len(texts), PERMUTATIONS), dtype=np.uint16)
    for start in range(0, len(texts), CHUNK):
        hashes, starts = _shingles(texts[start : start + CHUNK])
        for column, multiplier in enumerate(_MULTIPLIERS):
            smallest = np.minimum.reduceat(hashes * multiplier, starts[:-1])
            # The top bits of a minimum are nearly all zero; these tell different ones apart.
            found[start : start + CHUNK, column] = (smallest >> np.uint64(16)).astype(np.uint16)
    return found


# --- candidates --------------------------------------------------------------------------------------------


def bands(sketches: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each band: its key, uint64 [n], and the rows in the order of this band and then the next one, int64 [n]."""
    keys = np.ascontiguousarray(sketches).view(np.uint64)
    for band in range(BANDS):
        # Within a large bucket the next band brings likely copies side by side.
        yield keys[:, band], np.lexsort((keys[:, (band + 1) % BANDS], keys[:, band]))


def estimates(sketches: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimated similarity of pairs of rows, float32 [pairs]."""
    alike = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(first), 1 << 16):
        span = slice(start, start + (1 << 16))
        alike[span] = (sketches[first[span]] == sketches[second[span]]).mean(axis=1, dtype=np.float32)
    return alike


def candidates(sketches: np.ndarray, least: float, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (earlier, later) of `rows` whose estimate is at least `least`, band by band; each at most once a band.

    A row is compared with the first of its bucket and the few before it in the bucket, so a template that a
    hundred thousand rows share costs no more than any other bucket.
    """
    for key, order in bands(sketches[rows]):
        key = key[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = key[1:] != key[:-1]
        place = np.arange(len(order)) - np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))  # within the bucket
        for back in (*range(1, NEIGHBOURS + 1), 0):
            at = np.flatnonzero(place >= back if back else place > NEIGHBOURS)
            partner = order[at - back] if back else order[at - place[at]]
            first, second = rows[np.minimum(order[at], partner)], rows[np.maximum(order[at], partner)]
            close = estimates(sketches, first, second) >= least
            yield first[close], second[close]


def groups(sketches: np.ndarray, threshold: float = 0.7) -> np.ndarray:
    """For each row the smallest index of its group of estimated near copies, int32 [n]; a lone row has its own."""
    group = np.arange(len(sketches), dtype=np.int32)
    for first, second in candidates(sketches, threshold, np.arange(len(sketches))):
        _join(group, first, second)
    return group


def _join(group: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Give both rows of each pair, and all rows of their groups, the smaller of the two indices."""
    while True:
        one, other = group[first], group[second]
        apart = one != other
        if not apart.any():
            return
        first, second, one, other = first[apart], second[apart], one[apart], other[apart]
        np.minimum.at(group, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(group, flat := group[group]):
            group[:] = flat


# --- exact copies ------------------------------------------------------------------------------------------


def normal(text: str) -> str:
    """The text with single blanks for all white space, case folded."""
    return " ".join(text.split()).casefold()


def exact_hashes(texts: Sequence[str]) -> np.ndarray:
    """Hash of each text but for white space and case, int64 [n]; good within this process only."""
    pieces = chain.from_iterable(texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
    return np.fromiter((hash(normal(text)) for text in pieces), dtype=np.int64, count=len(texts))


def exact_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(first row, later row) for every row that says the same as an earlier one, but for white space and case."""
    hashes = exact_hashes(texts)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    pairs: list[tuple[int, int]] = []
    first = -1
    for at in same:
        before, row = int(order[at - 1]), int(order[at])
        first = first if pairs and pairs[-1][1] == before else before
        if normal(texts[first]) == normal(texts[row]):
            pairs.append((first, row))
    return sorted(pairs, key=lambda pair: pair[1])
