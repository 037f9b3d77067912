"""Looking at data before training: the quality report, the mask X-ray, a cleaned copy, another format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.config import DataSection, RunConfig
from llm_finetune_kit.data import prepare
from llm_finetune_kit.data.formats import detect
from llm_finetune_kit.data.formats.convert import convert, write_rows
from llm_finetune_kit.data.formats.examples import Formatted, to_examples
from llm_finetune_kit.data.gate import gate
from llm_finetune_kit.data.masks import encode
from llm_finetune_kit.data.quality import QualityReport, inspect_data
from llm_finetune_kit.data.ready import is_ready
from llm_finetune_kit.data.sources import Source, held_out_beside, read_source
from llm_finetune_kit.data.xray import Totals, XrayExample, totals, xray
from llm_finetune_kit.errors import DataError
from llm_finetune_kit.report.words import name
from llm_finetune_kit.report.xray_views import xray_html

SHOWN = 3  # examples in the X-ray of a report
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
overflow-wrap: anywhere }} h1 {{ font-size: 1.5rem }}</style></head><body><h1>{title}</h1>"""


@dataclass(frozen=True)
class Previewed:
    """Some examples token by token, as they are trained on; counts over the whole set; what the gate says of it."""

    name: str
    examples: list[XrayExample]
    places: list[str]
    totals: Totals
    max_length: int
    gate: str  # why training would be refused; empty if it would not be
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every token with its id, text and state."""
        examples = [
            {"place": place, "tokens": [vars(token) for token in example.tokens]}
            for place, example in zip(self.places, self.examples, strict=True)
        ]
        plain = {"name": self.name, "max_length": self.max_length, "totals": vars(self.totals) | {"share": self.totals.share}}
        return plain | {"gate": self.gate, "warnings": self.warnings, "examples": examples}

    @property
    def verdict(self) -> str:
        """Whether the gate lets the data pass."""
        passes = "the gate lets it pass: what is marked is what is learned"
        return f"training would stop here: {self.gate}" if self.gate else passes

    def fragment(self) -> str:
        """The X-ray as a piece of HTML."""
        return xray_html(self.examples, self.totals, [name(place) for place in self.places])

    def page(self) -> str:
        """The X-ray as one HTML page."""
        said = [self.verdict, *(f"Warning: {warning}" for warning in self.warnings)]
        below = "".join(f"<p>{escape(line)}</p>" for line in said)
        return f"{HEAD.format(title=escape(f'What is learned from {name(self.name)}'))}{self.fragment()}{below}</body></html>"


@dataclass(frozen=True)
class Checked:
    """What was found in a data set, its format and how that was told, and with a model the X-ray of some examples."""

    report: QualityReport
    format: str
    why_format: str
    previewed: Previewed | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, with the format and how it was told."""
        return self.report.to_dict() | {"format": self.format, "why_format": self.why_format}

    def page(self) -> str:
        """The same as one HTML page."""
        from llm_finetune_kit.report.data_page import page

        report = self.report.to_dict()
        told = f"{name(self.report.name)} is read as {self.format}: {self.why_format}"
        return page(report | {"notes": [told, *report["notes"]]}, xray_html=self.previewed.fragment() if self.previewed else "")


def understood(spec: Any, config: RunConfig) -> tuple[Source, Formatted]:
    """All rows of a data set; those that cannot be used are dropped and listed with their reasons."""
    settings = config.data
    source = read_source(spec, seed=config.training.seed, drop=True)
    if is_ready(source):
        fix = "check the rows before they are tokenized"
        raise DataError(143, "the rows are tokenized already, and there is no text to look at", where=source.name, fix=fix)
    detected = detect(source, settings.format, settings.columns)
    return source, to_examples(
        source, detected, on_bad_rows="drop", system_prompt=settings.system_prompt, threads=settings.threads
    )


def check(
    spec: Any, config: RunConfig, *, held_out: Any = None, model: str | None = None, max_length: int | None = None
) -> Checked:
    """The quality report of a data set. With `held_out`, leakage between the two; with a model, all that counts tokens.

    Raises DataError only for files that cannot be read at all.
    """
    source, formatted = understood(spec, config)
    told = detect(source, config.data.format, config.data.columns)
    held_out = held_out_beside(spec) if held_out is None else held_out
    apart = understood(held_out, config) if held_out is not None else None
    if model is None or formatted.examples[0].rejected is not None:
        return Checked(inspect_data(source, formatted, held_out=apart), told.format.name, told.why)
    chat, limit = _tokenizer(model, config)
    tokens = encode(formatted.examples, chat, loss_on=config.data.loss_on, place=source.place)
    length = max_length or min(limit, int(tokens.lengths.max()))
    report = inspect_data(source, formatted, held_out=apart, tokens=tokens, max_length=length, chat=chat)
    texts, seed = formatted.examples[0].messages is None, config.training.seed
    shown = _previewed(tokens, chat, config.data, source.name, source.place, length, SHOWN, seed, texts=texts, limit=limit)
    return Checked(report, told.format.name, told.why, shown)


def _tokenizer(model: str, config: RunConfig) -> tuple[Any, int]:
    """The tokenizer with its template, and the longest text that the model can read."""
    from llm_finetune_kit.models.facts import read_config
    from llm_finetune_kit.models.locate import locate
    from llm_finetune_kit.models.tokenizer import load_tokenizer

    trust = config.model.trust_remote_code
    located = locate(
        model, revision=config.model.revision, cache_dir=config.model.cache_dir, weights=False, trust_remote_code=trust
    )
    folder = located.folder
    limit = getattr(read_config(folder, trusted=located.trusted), "max_position_embeddings", None)
    return load_tokenizer(folder, config.data.template, trusted=located.trusted), int(limit or 1 << 20)


# --- preview -----------------------------------------------------------------------------------------------


def preview(spec: Any, config: RunConfig, *, model: str, max_length: int | None = None, count: int = SHOWN) -> Previewed:
    """The X-ray of `count` examples of a data set, chosen by the seed, under a model's tokenizer and template."""
    settings, seed = config.data, config.training.seed
    read = prepare.read(spec, settings, seed)
    chat, limit = _tokenizer(model, config)
    data = prepare.tokenize(read, settings, chat, chat.fingerprint(), seed)
    length = max_length or min(limit, int(data.tokens.lengths.max()))
    texts = data.report["format"] == "text"
    return _previewed(data.tokens, chat, settings, read.name, data.place, length, count, seed, texts=texts, limit=limit)


def _previewed(
    tokens: Any, chat: Any, settings: DataSection, source: str, place: Callable[[int], str], length: int, count: int, seed: int,
    *, texts: bool, limit: int,
) -> Previewed:  # fmt: skip
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(tokens))[:count]
    refused, warnings = "", list[str]()
    try:
        _, _, warnings = gate(tokens, chat, settings, source, length, place=place, texts=texts, limit=limit)
    except DataError as error:
        refused = str(error)
    examples = xray(tokens, length, chat, [int(index) for index in chosen])
    places = [place(example.row) for example in examples]
    return Previewed(source, examples, places, totals(tokens, length), length, refused, warnings)


# --- other copies of the data ------------------------------------------------------------------------------


def cleaned(spec: Any, config: RunConfig, *, out: Path, held_out: Any = None) -> dict[str, Any]:
    """Write a copy without faulty, repeated, empty and leaked rows; the counts of what was removed and repaired."""
    from llm_finetune_kit.data.quality.tidy import tidy

    source, formatted = understood(spec, config)
    return tidy(source, formatted, out=out, held_out=understood(held_out, config) if held_out is not None else None)


def converted(spec: Any, config: RunConfig, *, to: str, out: Path, overwrite: bool = False) -> tuple[int, list[str]]:
    """Write a data set in another format; how many rows were written, and notes on what was left out."""
    source, formatted = understood(spec, config)
    lost: Counter[str] = Counter()
    rows = list(convert(formatted.examples, to, lost))
    write_rows(out, rows, overwrite=overwrite)
    notes = [
        *prepare.limited(source),
        *source.notes,
        *prepare.broken_in_words(source),
        *formatted.warnings,
        *(f"{count:,} rows: they {what}" for what, count in lost.items()),
    ]
    left = len(formatted.dropped)
    return len(rows), notes + ([f"{left:,} rows could not be used and are not in it"] if left else [])
