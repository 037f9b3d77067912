"""Numbers, names and texts as a person reads them, safe for the place they are written to."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable
from typing import Any

from llm_finetune_kit.data.cells import guarded


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def perplexity(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if value >= 1e6 else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """`48 s`, `12 min 5 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def name(text: str) -> str:
    """A name without the folders of the machine it came from."""
    if text.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1] or text
    return text


def value(thing: Any) -> str:
    """The value of a knob in words."""
    if thing is None:
        return "none"
    if isinstance(thing, bool):
        return "yes" if thing else "no"
    if isinstance(thing, float):
        return f"{thing:g}"
    if isinstance(thing, (list, tuple)):
        return f"{len(thing):,} rows" if thing and isinstance(thing[0], dict) else ", ".join(value(item) for item in thing)
    return name(str(thing))


def csv_table(rows: Iterable[Iterable[Any]]) -> str:
    """CSV whose text cells no spreadsheet takes for a formula: they get a leading apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow([_csv_text(cell) if isinstance(cell, str) else cell for cell in row])
    return out.getvalue()


def _csv_text(text: str) -> str:
    return guarded(re.sub(r"\r\n?", "\n", text))


def markdown_cell(text: str) -> str:
    """Text that stays text inside a Markdown table."""
    escaped = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(text.strip(), quote=False))
    escaped = re.sub(r"https?://|www\.", lambda found: found[0].replace(":", "&#58;").replace(".", "&#46;"), escaped)
    return re.sub(r"\r\n|\r|\n", "<br>", escaped) or "*(nothing)*"


def markdown_table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
