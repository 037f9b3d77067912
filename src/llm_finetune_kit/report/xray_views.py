"""The mask X-ray to look at: in a terminal with or without colour, and as HTML for the report and the browser page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from llm_finetune_kit.data.xray import State, Totals, XrayExample

if TYPE_CHECKING:
    from rich.text import Text

LONGEST = 3000  # tokens of one example that a view shows; the rest is counted
NAMES: dict[State, str] = {"trained": "trained", "context": "not trained", "cut": "cut off"}
STYLES: dict[State, str] = {"trained": "bold green", "context": "dim", "cut": "red strike"}
BRACKETS: dict[State, tuple[str, str]] = {"trained": ("⟦", "⟧"), "context": ("", ""), "cut": ("⟨", "⟩")}


def visible(text: str) -> str:
    """Line feeds and tabs that can be seen; other control characters as their code."""
    shown = text.replace("\n", "↵\n").replace("\t", "⇥\t")
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def summary(found: Totals) -> str:
    """The totals in one line."""
    line = f"{_examples(found.examples)}, {found.tokens:,} tokens, {found.trained:,} trained ({found.share:.1%})"
    if found.cut_examples:
        line += f"; {_examples(found.cut_examples)} cut: {found.cut_tokens:,} tokens lost, {found.cut_trained:,} of them answers"
    return line


def _examples(count: int) -> str:
    return f"{count:,} example{'s' * (count != 1)}"


def heading(example: XrayExample, place: str = "") -> str:
    """Where the example comes from, and how many of its tokens are what."""
    counts = [f"{example.count(state):,} {name}" for state, name in NAMES.items() if example.count(state)]
    return f"{place or f'row {example.row + 1}'}: {len(example.tokens):,} tokens, {', '.join(counts)}"


def _shown(example: XrayExample) -> tuple[XrayExample, int]:
    """The example up to LONGEST tokens, and how many are left out."""
    left_out = max(0, len(example.tokens) - LONGEST)
    return (XrayExample(example.row, example.tokens[:LONGEST]) if left_out else example), left_out


def xray_text(example: XrayExample, *, colour: bool = True) -> Text:
    """For a terminal. What is trained stands in ⟦ ⟧ and what is cut in ⟨ ⟩, so it can be told without colour too."""
    from rich.text import Text

    shown, left_out = _shown(example)
    text = Text()
    for state, run in shown.runs():
        before, after = BRACKETS[state]
        text.append(f"{before}{visible(run)}{after}", style=STYLES[state] if colour else "")
    if left_out:
        text.append(f"\n… and {left_out:,} tokens more")
    return text


def legend_text(*, colour: bool = True) -> Text:
    """What the marks of `xray_text` mean."""
    from rich.text import Text

    text = Text()
    for state, name in NAMES.items():
        before, after = BRACKETS[state]
        text.append(f"{before}{name}{after}", style=STYLES[state] if colour else "")
        text.append("  ")
    text.append("↵ line feed  · part of a character")
    return text


# Colours and underlines both tell the states apart; the names are the fragment's own, so any page can hold it.
CSS = """\
.xray { --x-on: #0b5d33; --x-on-ground: #d9f2e3; --x-off: #5d656f;
--x-cut: #a8321b; --x-cut-ground: #fbe9e4; --x-line: #d4d6d0; }
@media (prefers-color-scheme: dark) {
.xray { --x-on: #a6ecc3; --x-on-ground: #17402a; --x-off: #a2abb5;
--x-cut: #ff9c85; --x-cut-ground: #3a1d17; --x-line: #3d444c; } }
.xray p { margin: .3rem 0; max-width: none; } .xray .key span { margin-right: 1rem; }
.xray details { border-top: 1px solid var(--x-line); padding: .45rem 0; } .xray summary { cursor: pointer; }
.xray pre { font: .82rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
overflow-wrap: anywhere; margin: .4rem 0; max-height: 32rem; overflow-y: auto; }
.xray b, .xray i, .xray s { font-weight: inherit; font-style: normal; padding: .1em 0; box-shadow: inset 1px 0 var(--x-line); }
.xray b { color: var(--x-on); background: var(--x-on-ground); border-bottom: 2px solid var(--x-on); }
.xray i { color: var(--x-off); }
.xray s { color: var(--x-cut); background: var(--x-cut-ground); }
"""
TAGS: dict[State, str] = {"trained": "b", "context": "i", "cut": "s"}


def xray_html(examples: Sequence[XrayExample], found: Totals, places: Sequence[str] = ()) -> str:
    """A fragment with its own styles and no scripts; every text is escaped. `places` name the examples' lines."""
    key = "".join(f"<span><{TAGS[state]}>{name}</{TAGS[state]}></span>" for state, name in NAMES.items())
    parts = [
        f'<div class="xray"><style>{CSS}</style><p>{escape(summary(found))}</p>',
        f'<p class="key">{key}<span>↵ line feed</span><span>· part of a character</span></p>',
    ]
    for number, example in enumerate(examples):
        shown, left_out = _shown(example)
        place = places[number] if number < len(places) else ""
        tokens = "".join(
            f'<{TAGS[token.state]} title="{token.id}">{escape(visible(token.text))}</{TAGS[token.state]}>'
            for token in shown.tokens
        )
        more = f"<p>… and {left_out:,} tokens more</p>" if left_out else ""
        is_open = " open" if number == 0 else ""
        parts.append(f"<details{is_open}><summary>{escape(heading(example, place))}</summary><pre>{tokens}</pre>{more}</details>")
    return "".join(parts) + "</div>"
