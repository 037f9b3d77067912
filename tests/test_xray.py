"""The mask X-ray: what is shown is what the training step computes, readable with and without colour."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from families import FAMILIES, KINDS, SHARED, TALKS, chat_of, encoded, learned, talk
from llm_finetune_kit.data.formats import Example
from llm_finetune_kit.data.masks import encode
from llm_finetune_kit.data.xray import Totals, token_texts, totals, xray
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.tokenizer import load_tokenizer
from llm_finetune_kit.report.xray_views import LONGEST, heading, legend_text, summary, visible, xray_html, xray_text

SCRIPT = talk("<script>alert('&')</script>\n<b>?", "Say: </pre> &amp; 你好 🙂\n\tdone")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real data is not here")


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_is_shown_as_it_is_computed(name: str, kind: str) -> None:
    chat = chat_of(name, kind)
    tokens = encoded(chat, *TALKS.values())
    for index, example in enumerate(xray(tokens, 10_000, chat, range(len(tokens)))):
        ids, trained = tokens.example(index)
        assert [token.id for token in example.tokens] == ids.tolist()
        assert [token.state == "trained" for token in example.tokens] == trained.tolist()
        said = ["".join(text for state, text in example.runs() if state == "trained")]
        assert "".join("".join(said).split()) == "".join("".join(learned(chat, tokens, index)).split())


@pytest.mark.parametrize("length", [3, 9, 20, 60])
def test_cut_tokens_and_totals_are_those_of_the_cut_set(length: int) -> None:
    chat = load_tokenizer(demo_folder())
    tokens = encode([Example(talk(f"Why {'so ' * n}?", f"Because {'it is ' * n}."), None, n + 5) for n in range(8)], chat)
    shown = xray(tokens, length, chat, range(len(tokens)))
    cut, examples, trained = tokens.cut(length)
    found = totals(tokens, length)
    assert [example.row for example in shown] == [n + 5 for n in range(8)]
    assert sum(example.count("cut") for example in shown) == found.cut_tokens == len(tokens.ids) - len(cut.ids)
    assert sum(example.count("trained") for example in shown) == found.trained == int(cut.targets.sum())
    assert (found.examples, found.tokens, found.cut_examples, found.cut_trained) == (8, len(cut.ids), examples, trained)
    assert found.share == found.trained / len(cut.ids)
    for example in shown:
        assert all(token.state != "cut" for token in example.tokens[:length])
        assert all(token.state == "cut" for token in example.tokens[length:])


def test_the_flags_come_from_the_passes_and_not_from_the_mask() -> None:
    """Nothing predicts a first token: a mask may mark it, the step never computes it."""
    chat = load_tokenizer(demo_folder())
    tokens = encode([Example(SCRIPT, None, 0)], chat, loss_on="all")
    assert tokens.trained.all()
    assert [token.state for token in xray(tokens, 100, chat, [0])[0].tokens][:2] == ["context", "trained"]
    nothing = replace(tokens, trained=np.zeros_like(tokens.trained))
    assert {token.state for token in xray(nothing, 100, chat, [0])[0].tokens} == {"context"}


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_read_as_text_and_parts_of_characters_as_dots(kind: str) -> None:
    chat = chat_of("trl/llama3", kind)
    text = "My name is Jürgen, 你好 🙂!\nSo."
    ids = chat.backend.encode(text, add_special_tokens=False).ids
    texts = token_texts(ids, chat)
    assert "".join(text for text, part in texts if not part).strip() == text
    assert sum(part for _, part in texts) > 3  # neither vocabulary has the emoji
    assert {text for text, part in texts if part} == {"·"}
    assert token_texts([chat.eos_id], chat) == [("<|eot_id|>", False)]
    torn = token_texts(chat.backend.encode("🙂", add_special_tokens=False).ids[-4:-1], chat)
    assert torn == [("·", False)] * 3


def shown_example(length: int = 1000) -> tuple[list, Totals]:
    chat = load_tokenizer(demo_folder())
    tokens = encode([Example(SCRIPT, None, 6)], chat)
    return xray(tokens, length, chat, [0]), totals(tokens, length)


def printed(*, colour: bool, length: int = 1000) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=colour, color_system="truecolor" if colour else None, no_color=not colour, width=100
    )
    examples, _ = shown_example(length)
    console.print(xray_text(examples[0], colour=colour), legend_text(colour=colour))
    return out.getvalue()


def test_in_a_terminal_the_marks_survive_without_colour() -> None:
    plain = printed(colour=False, length=45)
    assert "\x1b" not in plain
    assert plain.count("⟦") == plain.count("⟧") == 2  # the answer, and the legend
    assert "⟨" in plain
    assert "<script>alert('&')</script>↵\n<b>?" in plain
    coloured = printed(colour=True, length=45)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("a\n\tb\x00\x1b[31m\u200b") == "a↵\n⇥\tb\\x00\\x1b[31m\\x200b"


class Reader(HTMLParser):
    """Texts by the tag they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open or self.open[-1:] == ["summary"]:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


@pytest.mark.parametrize("length", [45, 1000])
def test_as_html_every_text_is_escaped_and_every_tag_closed(length: int) -> None:
    examples, found = shown_example(length)
    html = xray_html(examples, found, ["rows.jsonl line <7>"])
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert "<script" not in html
    assert reader.texts["summary"] == heading(examples[0], "rows.jsonl line <7>")
    for tag, state in (("b", "trained"), ("i", "context"), ("s", "cut")):
        assert reader.texts.get(tag, "") == "".join(visible(t.text) for t in examples[0].tokens if t.state == state)
    assert summary(found) in html


def test_long_examples_are_shown_up_to_a_limit_and_counted() -> None:
    examples, found = shown_example()
    long = replace(examples[0], tokens=examples[0].tokens * 200)
    left_out = len(long.tokens) - LONGEST
    assert f"{left_out:,} tokens more" in xray_text(long).plain
    html = xray_html([long], found)
    assert f"{left_out:,} tokens more" in html
    assert html.count("title=") == LONGEST


def test_totals_are_said_in_one_line() -> None:
    assert summary(Totals(3, 100, 25, 0, 0, 0)) == "3 examples, 100 tokens, 25 trained (25.0%)"
    assert summary(Totals(3, 100, 25, 1, 40, 30)).endswith("; 1 example cut: 40 tokens lost, 30 of them answers")
    assert Totals(0, 0, 0, 0, 0, 0).share == 0.0
