"""Several data sets as one, each with its share of the examples."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.prepare import Encoded
from llm_finetune_kit.data.streaming import join


def mixed(parts: list[Encoded], shares: list[float], seed: int) -> Encoded:
    """Several data sets as one, each with its share of the examples: as many as there are without repeating one.

    The set that is scarcest for its share is used whole; of the others, examples are chosen by the seed. Rows
    are numbered through: those of the second set follow those of the first.
    """
    counts = counts_of([len(part.tokens) for part in parts], shares)
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


def counts_of(sizes: list[int], shares: list[float]) -> list[int]:
    """How many examples of each set are taken: all of the scarcest for its share."""
    total = sum(shares)
    whole = min(size * total / share for size, share in zip(sizes, shares, strict=True))
    return [min(size, max(1, round(whole * share / total))) for size, share in zip(sizes, shares, strict=True)]


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
        "repeats": [sentence for report in reports for sentence in report.get("repeats", ())],
        "licence": " + ".join(dict.fromkeys(filter(None, (report["licence"] for report in reports)))) or None,
        "dropped": [row for report in reports for row in report["dropped"]],
        "warnings": [warning for report in reports for warning in report["warnings"]],
        "notes": [f"mixed: {', '.join(used)}", *(note for report in reports for note in report["notes"])],
        "parts": reports,
        "cached": all(report["cached"] for report in reports),
    }
