"""The data path in one place: read, format, tokenize (or find in the cache) and split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import cache
from llm_finetune_kit.data.formats import Formatted, detect, to_examples
from llm_finetune_kit.data.masks import Renderer, Tokens, encode
from llm_finetune_kit.data.sources import Source, read_source


@dataclass(frozen=True)
class Read:
    """Rows that were read and understood; `source` and `formatted` are None where the cache may hold their tokens."""

    name: str
    fingerprint: str
    source: Source | None
    formatted: Formatted | None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """All tokens of one data file, uncut, and what is known about them."""

    tokens: Tokens
    fingerprint: str
    report: dict[str, Any]


def read(spec: Any, settings: DataSection) -> Read:
    """Rows in one shape. Needs no torch and no tokenizer; raises DataError with file, line, field and fix.

    A file that was tokenized before with the same settings was understood then: it is not parsed again.
    """
    known = _known_before(spec, settings)
    if known is not None:
        return Read(str(spec), known, None, None)
    return _understood(spec, settings)


def _understood(spec: Any, settings: DataSection) -> Read:
    source = read_source(spec)
    detected = detect(source, settings.format)
    formatted = to_examples(source, detected, on_bad_rows=settings.on_bad_rows, system_prompt=settings.system_prompt)
    report = {
        "name": source.name,
        "fingerprint": source.fingerprint,
        "format": detected.format.name,
        "why_format": detected.why,
        "rows": len(source.rows),
        "examples": len(formatted.examples),
        "dropped": [{"place": source.place(row), "reason": reason} for row, reason in formatted.dropped],
        "warnings": [*source.notes, *formatted.warnings],
    }
    return Read(source.name, source.fingerprint, source, formatted, report)


def _reading(settings: DataSection) -> dict[str, Any]:
    """The settings that decide what a file's rows become."""
    return settings.model_dump(include={"format", "on_bad_rows", "system_prompt", "loss_on"})


def _known_before(spec: Any, settings: DataSection) -> str | None:
    if not isinstance(spec, str) or not Path(spec).is_file():
        return None
    try:
        fingerprint = cache.file_fingerprint(Path(spec))
    except OSError:
        return None
    marker = cache.entry(fingerprint, _reading(settings)).with_suffix(".read")
    return fingerprint if marker.is_file() else None


def tokenize(data: Read, settings: DataSection, chat: Renderer, chat_fingerprint: str) -> Encoded:
    """The tokens of all rows, from the cache if they are there."""
    path = cache.entry(data.fingerprint, _reading(settings) | {"chat": chat_fingerprint})
    found = cache.load(path)
    if found is not None:
        return Encoded(found[0], data.fingerprint, found[1] | {"name": data.name, "cached": True})
    if data.formatted is None:  # known to be sound, but under another tokenizer
        data = _understood(data.name, settings)
        path = cache.entry(data.fingerprint, _reading(settings) | {"chat": chat_fingerprint})
    assert data.formatted is not None
    tokens = encode(data.formatted.examples, chat, loss_on=settings.loss_on)
    if data.source is not None and data.source.kind != "rows":
        cache.store(path, tokens, data.report)
        _mark_read(data, settings)
    return Encoded(tokens, data.fingerprint, data.report | {"cached": False})


def _mark_read(data: Read, settings: DataSection) -> None:
    marker = cache.entry(data.fingerprint, _reading(settings)).with_suffix(".read")
    try:
        marker.touch()
    except OSError:
        pass


def split(tokens: Tokens, settings: DataSection, seed: int, *, apart: bool) -> tuple[Tokens, Tokens | None, str]:
    """Training and held-out examples, and where the held-out ones come from.

    `apart` says that an eval_file is given. Otherwise the share `validation_split` is taken, by default 5 % but
    at least 32 and at most 512 examples, and never more than a fifth.
    """
    chosen = np.random.Generator(np.random.PCG64([seed, 1 << 31])).permutation(len(tokens))
    if settings.max_samples is not None:
        chosen = chosen[: settings.max_samples]
    count = 0
    if not apart:
        share = settings.validation_split
        wanted = len(chosen) * share if share is not None else min(512, max(0.05 * len(chosen), min(32, 0.2 * len(chosen))))
        count = min(round(wanted), len(chosen) - 1)
    if count == 0:
        return tokens.select(np.sort(chosen)), None, "none"
    held_out, train = chosen[:count], chosen[count:]
    return tokens.select(np.sort(train)), tokens.select(np.sort(held_out)), f"{count} of {len(chosen)} rows, chosen by the seed"
