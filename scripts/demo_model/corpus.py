"""The chat corpus of the demo model: four openly licensed sets, read into one shape.

Sources (file names relative to the data folder):
    sft/databricks-dolly-15k.jsonl.gz        CC BY-SA 3.0      instructions and answers
    dialogue/sgd_sharegpt_train.jsonl.gz     CC BY-SA 4.0      task dialogues, many turns
    sft/gsm8k_train.jsonl.gz                 MIT               sums in words
    text/tinystories_sample_2MiB.txt.gz      CDLA-Sharing-1.0  short stories
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]

DOLLY, SGD, GSM8K, STORIES = "dolly", "sgd", "gsm8k", "tinystories"
SOURCES = (DOLLY, SGD, GSM8K, STORIES)


@dataclass
class Row:
    """One conversation and where it came from."""

    source: str
    messages: list[Message]
    context: str = ""

    @property
    def key(self) -> str:
        """A digest of the text alone: the same row has the same key in any order, on any machine."""
        text = "\0".join(f"{m['role']}\0{m['content']}" for m in self.messages)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def answers(self) -> list[str]:
        return [m["content"] for m in self.messages if m["role"] == "assistant"]

    def as_json(self) -> str:
        return json.dumps({"messages": self.messages}, ensure_ascii=False)


# --- cleaning -----------------------------------------------------------------------------------

_SAME_MEANING = str.maketrans(
    {
        "‘": "'", "’": "'", "‚": "'", "‛": "'", "′": "'", "ʼ": "'",
        "“": '"', "”": '"', "„": '"', "‟": '"', "″": '"',
        "‐": "-", "‑": "-", "−": "-", "…": "...", "\t": " ",
    }
)  # fmt: skip


def _plain_character(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Zs":  # no-break, thin and other exotic spaces
        return " "
    if category in ("Zl", "Zp"):  # line and paragraph separators
        return "\n"
    if char != "\n" and (category[0] == "C" or char == "\ufffd"):  # control, format, unassigned, replacement
        return ""
    return char


def clean(text: str) -> str:
    """Plain quotes, spaces and newlines; no control or replacement characters; no ragged white space."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = text.translate(_SAME_MEANING)
    if not text.isascii() or not text.replace("\n", " ").isprintable():
        text = "".join(map(_plain_character, text))
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# --- reading ------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_dolly(data: Path) -> Iterator[Row]:
    for record in _json_lines(data / "sft/databricks-dolly-15k.jsonl.gz"):
        instruction, context = clean(record["instruction"]), clean(record["context"])
        question = f"{instruction}\n\n{context}" if context else instruction
        yield Row(DOLLY, _exchange(question, clean(record["response"])), context)


def read_sgd(data: Path) -> Iterator[Row]:
    roles = {"human": "user", "gpt": "assistant"}
    for record in _json_lines(data / "dialogue/sgd_sharegpt_train.jsonl.gz"):
        turns = record["conversations"]
        yield Row(SGD, [{"role": roles[turn["from"]], "content": clean(turn["value"])} for turn in turns])


def read_gsm8k(data: Path) -> Iterator[Row]:
    for record in _json_lines(data / "sft/gsm8k_train.jsonl.gz"):
        answer = re.sub(r"<<.*?>>", "", record["answer"])
        yield Row(GSM8K, _exchange(clean(record["question"]), clean(answer)))


def read_stories(data: Path, seed: int) -> Iterator[Row]:
    with gzip.open(data / "text/tinystories_sample_2MiB.txt.gz", "rt", encoding="utf-8") as file:
        pieces = file.read().split("<|endoftext|>")
    stories = [clean(piece) for piece in pieces[1:-1]]  # the first and the last are cut
    requests = StoryRequests(stories)
    for story in stories:
        rng = random.Random(f"{seed}:{story}")
        yield Row(STORIES, _exchange(requests.ask_for(story, rng), story))


def read_all(data: Path, seed: int) -> Iterator[Row]:
    yield from read_dolly(data)
    yield from read_sgd(data)
    yield from read_gsm8k(data)
    yield from read_stories(data, seed)


# --- a request for each story -------------------------------------------------------------------

_DETERMINED = re.compile(r"\b(an?|the|his|her|their|my|your)\s+([a-z]{3,})\b(\s*[.,!?;\"]|\s+[a-z]+)?", re.I)
_NAMED = re.compile(
    r"\ba ((?:little |small |big |brave |kind |young |old )?"
    r"(?:girl|boy|dog|cat|bird|bear|fish|bunny|rabbit|mouse|frog|duck|car|truck|train|robot|tree|man|woman))"
    r" (?:named|called) ([A-Z][a-z]+)"
)
_AFTER_A_NOUN = frozenset(
    """
    and was were is in to that with on for at had he she they from who but said of as so it because into would
    could when where saw did has looked went came could started felt
    """.split()  # noqa: SIM905
)
_NOT_A_SUBJECT = frozenset(
    """
    day time way lot bit end one thing things same other side next rest minute moment idea name more first
    second middle top help fun mom mommy dad daddy mother father eyes hands hand head face arms feet mouth mum
    mama kids first best most words word people inside outside while new big little small old happy sad red blue
    good bad pretty nice special tall long
    """.split()  # noqa: SIM905
)


class StoryRequests:
    """Natural requests for a story, made from words it holds.

    There is no tagger here: a word counts as a noun when, after "a", "the" or "his", what follows it in
    the whole collection is mostly the end of a phrase (punctuation, "was", "and"...), which is not so
    for adjectives.
    """

    def __init__(self, stories: list[str]) -> None:
        seen: Counter[str] = Counter()
        closing: Counter[str] = Counter()
        with_article: Counter[str] = Counter()
        with_an: Counter[str] = Counter()
        for story in stories:
            for article, word, after in self._determined(story):
                seen[word] += 1
                closing[word] += not after.isalpha() or after in _AFTER_A_NOUN
                with_article[word] += article in ("a", "an")
                with_an[word] += article == "an"
        self._phrases = {
            word: self._phrase(word, with_article[word] / count, with_an[word])
            for word, count in seen.items()
            if count >= 5 and closing[word] / count > 0.75 and word not in _NOT_A_SUBJECT
        }

    @staticmethod
    def _determined(story: str) -> Iterator[tuple[str, str, str]]:
        for match in _DETERMINED.finditer(story):
            article, word, after = match.groups(default="")
            yield article.lower(), word.lower(), after.strip().lower()

    @staticmethod
    def _phrase(word: str, article_share: float, with_an: int) -> str:
        if article_share < 0.1:  # "the park", "the water", "her toys"
            return word if word.endswith("s") and not word.endswith("ss") else f"the {word}"
        return f"an {word}" if with_an else f"a {word}"

    def subjects(self, story: str) -> list[str]:
        """Noun phrases of the story, the most frequent first."""
        words = Counter(word for _, word, _ in self._determined(story) if word in self._phrases)
        return [self._phrases[word] for word, _ in words.most_common(4)]

    def ask_for(self, story: str, rng: random.Random) -> str:
        subjects = self.subjects(story)
        choices: list[tuple[float, str]] = [
            (1.0, rng.choice(["Write a short story.", "Tell me a story.", "Tell me a short story, please."]))
        ]
        if subjects:
            subject = rng.choice(subjects[:3])
            forms = [
                "Tell me a story about {}.", "Write a short story about {}.", "Can you tell me a story about {}?",
                "I would like to hear a story about {}.", "Please write a story about {} for a child.",
            ]  # fmt: skip
            choices.append((4.0, rng.choice(forms).format(subject)))
        if len(subjects) > 1:
            first, second = rng.sample(subjects[:4], 2)
            choices.append(
                (
                    1.5,
                    rng.choice(["Tell me a story about {} and {}.", "Write a story with {} and {} in it."]).format(first, second),
                )
            )
        if named := _NAMED.search(story):
            kind, name = named.groups()
            choices.append(
                (
                    2.5,
                    rng.choice(["Tell me a story about a {} named {}.", "Write a short story about a {} called {}."]).format(
                        kind, name
                    ),
                )
            )
        return rng.choices([text for _, text in choices], [weight for weight, _ in choices])[0]
