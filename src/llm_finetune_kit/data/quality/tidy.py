"""A cleaned copy of a data file: without what the quality report would have removed, repaired where that is certain."""

# Faults of this module:
#
#   100  the copy would overwrite a file    102  rows that are not examples one by one
#   101  the copy cannot be written         103  nothing would be left

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.data import similar
from llm_finetune_kit.data.quality import NEAR, junk
from llm_finetune_kit.data.quality.copies import copies_across, near_duplicates
from llm_finetune_kit.data.quality.findings import EMPTY, SHOWN
from llm_finetune_kit.errors import DataError

REPAIRS = {"mojibake": junk.MOJIBAKE, "control characters": junk.CONTROL, "invisible characters": junk.INVISIBLE}


def tidy(source: Any, formatted: Any, *, out: Path | str, held_out: Any = None) -> dict[str, Any]:
    """Write the good rows, with all their columns, as JSON lines to `out`, which must not exist.

    Removed are lines that cannot be read, faulty rows and those without an answer, exact and near duplicates of an
    earlier row, and what `held_out` (a Source and its Formatted) has too. Returns rows, written, removed and repaired,
    counted by reason, and the first lines that could not be read.
    """
    out = Path(out)
    _refuse(source, formatted, out)
    removed: Counter[str] = Counter("without an answer" if reason in EMPTY else "faulty" for _, reason in formatted.dropped)
    removed["unreadable"] = len(source.broken)
    examples = [_repaired(example) for example in formatted.examples]
    kept = np.array([place for place, example in enumerate(examples) if _says_something(example)], dtype=np.int64)
    removed["without an answer"] += len(examples) - len(kept)
    kept = _without_copies(examples, kept, held_out[1].examples if held_out else None, removed)
    if not len(kept):
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in removed.most_common())
        raise DataError(103, "no row would be left", where=source.name, why=reasons, fix="correct the rows instead")
    repaired: Counter[str] = Counter()
    _write(out, (_repaired_row(source.rows[examples[int(place)].row], repaired) for place in kept))
    return {
        "rows": len(source.rows) + len(source.broken),
        "written": len(kept),
        "removed": {reason: count for reason, count in removed.items() if count},
        "repaired": {name: count for name, count in repaired.items() if count},
        "unreadable": [f"{place}: {why}" for place, why in list(source.broken.items())[:SHOWN]],
    }


def _refuse(source: Any, formatted: Any, out: Path) -> None:
    if os.path.lexists(out):
        fix = "name a file that does not exist yet; the original is never touched"
        raise DataError(100, "there is such a file already", where=str(out), fix=fix)
    if not out.parent.is_dir():
        raise DataError(101, "there is no such folder", where=str(out.parent), fix="create it, or name a file elsewhere")
    rows = {example.row for example in formatted.examples} | {row for row, _ in formatted.dropped}
    if len(formatted.examples) + len(formatted.dropped) != len(source.rows) or len(rows) != len(source.rows):
        why = "removing one row would change what others mean"
        fix = "write it as messages first: finetune data convert FILE --to messages --out rows.jsonl"
        raise DataError(102, "its rows are not examples one by one", where=source.name, why=why, fix=fix)


def _without_copies(examples: list[Any], kept: np.ndarray, held_out: list[Any] | None, removed: Counter[str]) -> np.ndarray:
    """The examples, as their indices, that neither the held-out ones nor earlier ones have too.

    What is searched depends on what is there, so it is searched until nothing more is found: a check of the
    copy then finds nothing either.
    """
    texts, answers = similar.Texts(examples), similar.Texts(examples, similar.answers_of)
    sketches = similar.sketch(texts)
    while True:
        before = len(kept)
        if held_out:
            mine = [examples[int(place)] for place in kept]
            pairs = _leaks(mine, held_out, sketches[kept])
            removed["in the held-out data"] += len(pairs)
            kept = np.delete(kept, pairs)
        exact = [later for _, later in similar.exact_duplicates(similar.Texts([examples[int(place)] for place in kept]))]
        removed["exact duplicates"] += len(exact)
        kept = np.delete(kept, np.array(exact, dtype=np.int64))
        near = [later for _, later, _ in near_duplicates(texts, NEAR, answers=answers, sketches=sketches, rows=kept)]
        removed["near duplicates"] += len(near)
        kept = np.setdiff1d(kept, np.array(near, dtype=np.int64))
        if len(kept) == before:
            return kept


def _leaks(mine: list[Any], held_out: list[Any], sketches: np.ndarray) -> np.ndarray:
    """Places in `mine` of what the held-out examples have too, int64."""
    texts = similar.Texts(mine), similar.Texts(held_out)
    answers = similar.Texts(mine, similar.answers_of), similar.Texts(held_out, similar.answers_of)
    pairs = copies_across(*texts, NEAR, answers=answers, sketches=(sketches, similar.sketch(texts[1])))
    return np.unique(np.array([ours for ours, _, _ in pairs], dtype=np.int64))


# --- repairs -----------------------------------------------------------------------------------------------


def _repaired(example: Any) -> Any:
    """The example as its repaired row would give it."""
    if example.messages is None:
        text = junk.repaired(example.text)
        return example if text == example.text else replace(example, text=text)
    messages, rejected = _repaired_messages(example.messages), _repaired_messages(example.rejected or [])
    if messages is example.messages and (not rejected or rejected is example.rejected):
        return example
    return replace(example, messages=messages, rejected=rejected or None)


def _repaired_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    contents = [junk.repaired(message.get("content") or "") for message in messages]
    if all(content == (message.get("content") or "") for content, message in zip(contents, messages, strict=True)):
        return messages
    return [{**message, "content": content} for content, message in zip(contents, messages, strict=True)]


def _says_something(example: Any) -> bool:
    return bool(similar.answers_of(example).strip())


def _repaired_row(row: dict[str, Any], repaired: Counter[str]) -> dict[str, Any]:
    """The row with the texts in it repaired; `repaired` counts the rows by what was wrong."""
    texts = [text for text in _texts(row) if junk.repaired(text) != text]
    if not texts:
        return row
    for name, pattern in (
        ("mojibake", junk.MOJIBAKE),
        ("control characters", junk.CONTROL),
        ("invisible characters", junk.INVISIBLE),
    ):
        repaired[name] += any(pattern.search(text) for text in texts)
    return {key: _mended(value) for key, value in row.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return junk.repaired(value)
    if isinstance(value, list):
        return [_mended(inner) for inner in value]
    return {key: _mended(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _write(out: Path, rows: Iterator[dict[str, Any]]) -> None:
    """All of it or none of it."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, out)  # fails where the file has come to exist meanwhile; a rename would replace it
    except OSError as error:
        fix = "name a file in a folder that can be written, with space left"
        raise DataError(101, f"cannot be written: {error.strerror}", where=str(out), fix=fix) from error
    finally:
        draft.unlink(missing_ok=True)
