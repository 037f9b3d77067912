"""The data path in one place: which sets, read, understood, and tokenized or found in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import cache, similar
from llm_finetune_kit.data.formats import Formatted, detect, refuse_untrainable, to_examples
from llm_finetune_kit.data.masks import Renderer, Tokens, encode, notes
from llm_finetune_kit.data.quality.alphabet import dropped_characters, named
from llm_finetune_kit.data.ready import is_ready, ready_tokens
from llm_finetune_kit.data.sources import Source, held_out_beside, read_source
from llm_finetune_kit.errors import ConfigError

LOOKED_AT = 2000  # rows whose characters are held against the tokenizer
BOTH = {"alpaca": 1.0, "daily_dialog": 1.0}  # what `both` stands for: the two sets in equal shares


@dataclass(frozen=True)
class Read:
    """Rows that were read and understood; `source` and `formatted` are None where the cache may hold their tokens."""

    spec: Any
    name: str
    fingerprint: str
    source: Source | None
    formatted: Formatted | None
    report: dict[str, Any] = field(default_factory=dict)
    ready: Tokens | None = None  # of rows that were tokenized already


@dataclass(frozen=True)
class Encoded:
    """All tokens of a data set, uncut, and what is known about them.

    `sketches` [examples, 64] tell near copies (see similar.py); `place` names a row as a person finds it.
    """

    tokens: Tokens
    sketches: np.ndarray
    fingerprint: str
    report: dict[str, Any]
    place: Callable[[int], str]


def training_sets(settings: DataSection) -> dict[Any, float] | list[Any]:
    """The data sets to learn from: one alone in a list, or several with their shares. Raises ConfigError if none is named."""
    if settings.mix is not None:
        if settings.train_file is not None:
            fix = "keep one of them; data.mix may hold the file too"
            raise ConfigError(12, "data.train_file and data.mix are both given", where="data.mix", fix=fix)
        return dict(settings.mix)
    if settings.train_file == "both" and not Path("both").exists():
        return dict(BOTH)
    if settings.train_file is None:
        fix = "for example --data sample:chat or --data train.jsonl"
        raise ConfigError(5, "no training data is named", where="data.train_file", fix=fix)
    return [settings.train_file]


def is_named(settings: DataSection) -> bool:
    """Whether there is any training data."""
    return settings.train_file is not None or settings.mix is not None


def held_out_set(settings: DataSection) -> Any:
    """The eval_file, or the validation part that lies beside the training part; None where rows are to be split off."""
    if settings.eval_file is not None:
        return settings.eval_file
    if settings.validation_split is not None or settings.mix is not None or settings.train_file == "both":
        return None
    return held_out_beside(settings.train_file)


def read(spec: Any, settings: DataSection, seed: int = 42) -> Read:
    """Rows in one shape. Needs no torch and no tokenizer; raises DataError with file, line, field and fix.

    A file that was tokenized before with the same settings was understood then: it is not parsed again.
    """
    known = _known_before(spec, settings)
    if known is not None:
        return Read(spec, str(spec), known, None, None)
    return understood(spec, settings, seed)


def understood(spec: Any, settings: DataSection, seed: int) -> Read:
    """Rows in one shape like `read`, and parsed in any case."""
    source = read_source(spec, seed=seed, drop=settings.on_bad_rows == "drop")
    if is_ready(source):
        return _tokenized_already(spec, source)
    detected = detect(source, settings.format, settings.columns)
    refuse_untrainable(detected, source)
    formatted = to_examples(
        source, detected, on_bad_rows=settings.on_bad_rows, system_prompt=settings.system_prompt, threads=settings.threads
    )
    copies = similar.exact_duplicates(similar.Texts(formatted.examples))
    later = [formatted.examples[again].row for _, again in copies]
    warnings = [*limited(source), *broken_in_words(source), *formatted.warnings]
    dropped = [*source.broken.items(), *((source.place(row), reason) for row, reason in formatted.dropped)]
    report = _report(source, detected.format.name, detected.why, len(formatted.examples)) | {
        "repeated": len(later),
        "repeats": [f"{source.name}: {repeats_in_words(len(later))} ({source.spots(later)})"] if later else [],
        "dropped": [{"place": place, "reason": reason} for place, reason in dropped],
        "warnings": warnings,
    }
    return Read(spec, source.name, source.fingerprint, source, formatted, report)


def repeats_in_words(rows: int) -> str:
    """So many rows that say the same as an earlier one."""
    return f"{rows:,} {'row repeats' if rows == 1 else 'rows repeat'} an earlier one word for word"


def repeats(report: dict[str, Any], used: Tokens, most: int | None) -> list[str]:
    """What is to be said of copies: of all rows, or where only `most` of them are used, of those."""
    if most is None or most >= report["rows"]:
        return list(report.get("repeats", ()))
    copies = len(used) - len({used.example(index)[0].tobytes() for index in range(len(used))})
    return [f"of the rows that are used, {repeats_in_words(copies)}"] if copies else []


def limited(source: Source) -> list[str]:
    """One sentence on a licence that restricts use."""
    licence = source.licence
    return [f"{source.name}: non-commercial licence ({licence.name})"] if licence and not licence.commercial else []


def broken_in_words(source: Source) -> list[str]:
    """One sentence on lines that could not be read, if there are any."""
    if not source.broken:
        return []
    place, why = next(iter(source.broken.items()))
    return [f"{len(source.broken):,} lines cannot be read and are left out; the first: {place}, {why}"]


def _tokenized_already(spec: Any, source: Source) -> Read:
    report = _report(source, "tokens", "found input_ids", len(source.rows))
    return Read(spec, source.name, source.fingerprint, source, None, report, ready_tokens(source))


def _report(source: Source, format_name: str, why: str, examples: int) -> dict[str, Any]:
    """What is known of every data set; nothing repeated, dropped or warned of yet."""
    return {
        "name": source.name,
        "fingerprint": source.fingerprint,
        "format": format_name,
        "why_format": why,
        "rows": len(source.rows),
        "examples": examples,
        "repeated": 0,
        "licence": source.licence.name if source.licence else None,
        "dropped": [],
        "notes": source.notes,
        "warnings": [],
    }


def _reading(settings: DataSection) -> dict[str, Any]:
    """The settings that decide what a file's rows become."""
    return settings.model_dump(include={"format", "columns", "threads", "on_bad_rows", "system_prompt", "loss_on"})


def _known_before(spec: Any, settings: DataSection) -> str | None:
    if not isinstance(spec, str) or not Path(spec).is_file():
        return None
    try:
        fingerprint = cache.file_fingerprint(Path(spec))
    except OSError:
        return None
    marker = cache.entry(fingerprint, _reading(settings)).with_suffix(".read")
    return fingerprint if marker.is_file() else None


def tokenize(data: Read, settings: DataSection, chat: Renderer, chat_fingerprint: str, seed: int = 42) -> Encoded:
    """The tokens of all rows, from the cache if they are there."""
    if data.ready is not None:
        texts = [chat.decode(data.ready.example(index)[0].tolist()) for index in range(len(data.ready))]
        return Encoded(
            data.ready, similar.sketch(texts), data.fingerprint, data.report | {"cached": False}, _place_of(data, settings, seed)
        )
    path = cache.entry(data.fingerprint, _reading(settings) | {"chat": chat_fingerprint})
    found = cache.load(path)
    if found is not None:
        tokens, sketches, report = found
        place = _place_of(data, settings, seed)
        return Encoded(tokens, sketches, data.fingerprint, report | {"name": data.name, "cached": True}, place)
    if data.formatted is None:  # known to be sound, but under another tokenizer
        data = understood(data.spec, settings, seed)
        path = cache.entry(data.fingerprint, _reading(settings) | {"chat": chat_fingerprint})
    assert data.formatted is not None and data.source is not None
    return _encoded(data, settings, chat, path)


def _encoded(data: Read, settings: DataSection, chat: Renderer, path: Path) -> Encoded:
    """Tokens made anew, and put into the cache."""
    assert data.formatted is not None and data.source is not None
    examples, place = data.formatted.examples, data.source.place
    refused: list[tuple[int, str]] = []
    dropping = settings.on_bad_rows == "drop"
    tokens = encode(examples, chat, loss_on=settings.loss_on, place=place, refused=refused if dropping else None)
    report = data.report | {"notes": [*data.report["notes"], *notes(examples, chat)]}
    report["warnings"] = [*report["warnings"], *_unknown(tokens, chat), *_dropped(data.name, examples, place, chat)]
    if refused:
        rows = {row for row, _ in refused}
        examples = [example for example in examples if example.row not in rows]
        report["dropped"] = [*report["dropped"], *({"place": place(row), "reason": reason} for row, reason in refused)]
        told = f"{len(refused):,} rows are left out as the template refuses them; the first: {refused[0][1]}"
        report["warnings"] = [*report["warnings"], told]
        report["examples"] = len(examples)
    sketches = similar.sketch(similar.Texts(examples))
    if data.source.kind != "rows":
        cache.store(path, tokens, sketches, report)
        _mark_read(data, settings)
    return Encoded(tokens, sketches, data.fingerprint, report | {"cached": False}, place)


def _unknown(tokens: Tokens, chat: Renderer) -> list[str]:
    """What the tokenizer has no token for is lost: the model would neither read nor learn it."""
    unknown = getattr(chat.tokenizer, "unk_token_id", None)
    if unknown is None or unknown == chat.eos_id:
        return []
    hits = tokens.ids == unknown
    if not hits.any():
        return []
    examples = np.unique(np.searchsorted(tokens.starts, np.flatnonzero(hits), "right") - 1)
    return [
        f"{len(examples):,} examples hold characters that this tokenizer does not know; they become {hits.sum():,} times "
        f"{chat.tokenizer.unk_token} and are lost ({hits.mean():.1%} of all tokens)"
    ]


def _dropped(name: str, examples: Sequence[Any], place: Callable[[int], str], chat: Renderer) -> list[str]:
    """What the tokenizer drops without a word, in at most LOOKED_AT rows from all over the set."""
    stride = -(-len(examples) // LOOKED_AT)
    looked = examples[::stride]
    characters, holding = dropped_characters(map(similar.text_of, looked), chat)
    if not characters:
        return []
    rows = f"{len(holding):,} of {len(looked):,} rows looked at, the first: {place(looked[holding[0]].row)}"
    return [
        f"{name}: the tokenizer drops {named(characters)} ({rows}): the model can neither read nor write them; "
        "choose a model that knows them, or write them in words"
    ]


def _place_of(data: Read, settings: DataSection, seed: int) -> Callable[[int], str]:
    """Names rows of a file whose tokens were in the cache; the file is read again only if a row is to be named."""
    again: list[Source] = [] if data.source is None else [data.source]

    def place(row: int) -> str:
        if not again:
            again.append(read_source(data.spec, seed=seed))
        return again[0].place(row)

    return place


def _mark_read(data: Read, settings: DataSection) -> None:
    marker = cache.entry(data.fingerprint, _reading(settings)).with_suffix(".read")
    try:
        marker.touch()
    except OSError:
        pass
