"""The data path in one place: read, format, tokenize (or find in the cache), mix and split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import cache, similar
from llm_finetune_kit.data.formats import Formatted, detect, refuse_untrainable, to_examples
from llm_finetune_kit.data.masks import Renderer, Tokens, encode, notes
from llm_finetune_kit.data.ready import is_ready, ready_tokens
from llm_finetune_kit.data.sources import Source, held_out_beside, read_source
from llm_finetune_kit.data.streaming import join
from llm_finetune_kit.errors import ConfigError

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
    return _understood(spec, settings, seed)


def _understood(spec: Any, settings: DataSection, seed: int) -> Read:
    source = read_source(spec, seed=seed)
    if is_ready(source):
        return _tokenized_already(spec, source)
    detected = detect(source, settings.format, settings.columns)
    refuse_untrainable(detected, source)
    formatted = to_examples(
        source, detected, on_bad_rows=settings.on_bad_rows, system_prompt=settings.system_prompt, threads=settings.threads
    )
    copies = similar.exact_duplicates(similar.Texts(formatted.examples))
    later = [formatted.examples[again].row for _, again in copies]
    warnings = list(formatted.warnings)
    if later:
        said = "1 row repeats an earlier one" if len(later) == 1 else f"{len(later):,} rows repeat an earlier one"
        warnings.append(f"{said} word for word ({source.spots(later)})")
    report = {
        "name": source.name,
        "fingerprint": source.fingerprint,
        "format": detected.format.name,
        "why_format": detected.why,
        "rows": len(source.rows),
        "examples": len(formatted.examples),
        "repeated": len(later),
        "licence": source.licence,
        "dropped": [{"place": source.place(row), "reason": reason} for row, reason in formatted.dropped],
        "notes": source.notes,
        "warnings": warnings,
    }
    return Read(spec, source.name, source.fingerprint, source, formatted, report)


def _tokenized_already(spec: Any, source: Source) -> Read:
    report = {
        "name": source.name,
        "fingerprint": source.fingerprint,
        "format": "tokens",
        "why_format": "found input_ids",
        "rows": len(source.rows),
        "examples": len(source.rows),
        "repeated": 0,
        "licence": source.licence,
        "dropped": [],
        "notes": source.notes,
        "warnings": [],
    }
    return Read(spec, source.name, source.fingerprint, source, None, report, ready_tokens(source))


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
        data = _understood(data.spec, settings, seed)
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


# --- mixtures ----------------------------------------------------------------------------------------------


def mixed(parts: list[Encoded], shares: list[float], seed: int) -> Encoded:
    """Several data sets as one, each with its share of the examples: as many as there are without repeating one.

    The set that is scarcest for its share is used whole; of the others, examples are chosen by the seed. Rows
    are numbered through: those of the second set follow those of the first.
    """
    total = sum(shares)
    whole = min(len(part.tokens) * total / share for part, share in zip(parts, shares, strict=True))
    counts = [min(len(part.tokens), max(1, round(whole * share / total))) for part, share in zip(parts, shares, strict=True)]
    firsts = np.cumsum([0, *(part.report["rows"] for part in parts)])
    chosen, sketches = [], []
    for number, (part, count, first) in enumerate(zip(parts, counts, firsts, strict=False)):
        generator = np.random.Generator(np.random.PCG64([seed, number, 1 << 28]))
        indices = np.sort(generator.permutation(len(part.tokens))[:count])
        tokens = part.tokens.select(indices)
        chosen.append(Tokens(tokens.ids, tokens.trained, tokens.starts, (tokens.rows + first).astype(np.int32)))
        sketches.append(part.sketches[indices])
    digest = hashlib.sha256(repr([(part.fingerprint, share) for part, share in zip(parts, shares, strict=True)]).encode())

    def place(row: int) -> str:
        number = int(np.searchsorted(firsts, row, "right")) - 1
        return parts[number].place(row - int(firsts[number]))

    report = _mixed_report(parts, counts) | {"fingerprint": digest.hexdigest()}
    return Encoded(join(chosen), np.concatenate(sketches), digest.hexdigest(), report, place)


def _mixed_report(parts: list[Encoded], counts: list[int]) -> dict[str, Any]:
    reports = [part.report for part in parts]
    used = [f"{count:,} of {len(part.tokens):,} from {part.report['name']}" for part, count in zip(parts, counts, strict=True)]
    return {
        "name": " + ".join(report["name"] for report in reports),
        "format": " + ".join(dict.fromkeys(report["format"] for report in reports)),
        "why_format": "; ".join(f"{report['name']}: {report['why_format']}" for report in reports),
        "rows": sum(report["rows"] for report in reports),
        "examples": sum(counts),
        "repeated": sum(report["repeated"] for report in reports),
        "licence": " + ".join(dict.fromkeys(filter(None, (report["licence"] for report in reports)))) or None,
        "dropped": [row for report in reports for row in report["dropped"]],
        "warnings": [warning for report in reports for warning in report["warnings"]],
        "notes": [f"mixed: {', '.join(used)}", *(note for report in reports for note in report["notes"])],
        "parts": reports,
        "cached": all(report["cached"] for report in reports),
    }


# --- the split ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Training and held-out examples, where the held-out ones come from, and what copies were seen."""

    train: Tokens
    held_out: Tokens | None
    origin: str
    near_copies: int  # examples that nearly repeat an earlier one
    warnings: list[str] = field(default_factory=list)


def split(data: Encoded, settings: DataSection, seed: int, *, held_out: Encoded | None = None) -> Split:
    """Training and held-out examples that share no row and no near copy of one.

    With `held_out` these rows are held out, and training rows that nearly repeat one of them are told.
    Otherwise the share `validation_split` is taken, by default 5 % but at least 32 and at most 512 examples,
    and never more than a fifth; near copies of each other stay on one side.
    """
    chosen = np.random.Generator(np.random.PCG64([seed, 1 << 31])).permutation(len(data.tokens))
    if settings.max_samples is not None:
        chosen = chosen[: settings.max_samples]
    if held_out is not None:
        return _beside(data, np.sort(chosen), held_out)
    groups = similar.groups(data.sketches[chosen])
    copies = int(len(groups) - len(np.unique(groups)))
    share = settings.validation_split
    wanted = len(chosen) * share if share is not None else min(512, max(0.05 * len(chosen), min(32, 0.2 * len(chosen))))
    out = _whole_groups(groups, min(round(wanted), len(chosen) - 1))
    if not out.any():
        return Split(data.tokens.select(np.sort(chosen)), None, _why_none(len(chosen), share, wanted), copies)
    train, taken = (data.tokens.select(np.sort(chosen[part])) for part in (~out, out))
    origin = f"{out.sum():,} of {len(chosen):,} examples, chosen by the seed; near copies of an example stay on its side"
    return Split(train, taken, origin + _too_few(len(taken)), copies)


def _whole_groups(groups: np.ndarray, most: int) -> np.ndarray:
    """Which examples to hold out, bool [n]: whole groups in their order, each if there is still room for all of it."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    held: list[int] = []
    seen: set[int] = set()
    taken = 0
    for number in group.tolist():
        if number not in seen:
            seen.add(number)
            if taken + sizes[number] <= most:
                held.append(number)
                taken += int(sizes[number])
    marked: np.ndarray = np.isin(group, held)
    return marked


def _why_none(count: int, share: float | None, wanted: float) -> str:
    if share == 0:
        return "none: data.validation_split is 0"
    if count < 2:
        return "none: there is only one example, and it is needed for training"
    return f"none: {wanted:.1f} of {count} examples would be held out, or they are near copies of each other"


def _too_few(count: int) -> str:
    return "" if count >= 20 else f"; {count} are few, so the held-out loss is a rough guide"


def _beside(data: Encoded, chosen: np.ndarray, held_out: Encoded) -> Split:
    groups = similar.groups(np.concatenate([data.sketches[chosen], held_out.sketches]))
    train, apart = groups[: len(chosen)], groups[len(chosen) :]
    leaked = chosen[np.isin(train, apart)]
    warnings = []
    if len(leaked):
        shown = ", ".join(data.place(int(row)) for row in data.tokens.rows[leaked[:5]]) + (", ..." if len(leaked) > 5 else "")
        warnings.append(
            f"{len(leaked):,} training examples nearly repeat a held-out one ({shown}), so the held-out loss flatters; "
            "`finetune data check --eval --fix` writes a copy without them"
        )
    copies = int(len(train) - len(np.unique(train)))
    origin = str(held_out.report["name"]) + _too_few(len(held_out.tokens))
    return Split(data.tokens.select(chosen), held_out.tokens, origin, copies, warnings)
