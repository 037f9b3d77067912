"""Parts of the page that hold the comparison, what was measured, how the run stands and which files it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from llm_finetune_kit.events import Finished
from llm_finetune_kit.files import MANIFEST, read_json
from llm_finetune_kit.report import compared, words
from llm_finetune_kit.report.record import Record

MEANINGS = {
    "loss": "Mean surprise per learned token; lower is better.",
    "perplexity": "Among about how many equally likely tokens it hesitates; lower is better.",
    "bits_per_byte": "The same surprise per byte of text, so that tokenizers compare; lower is better.",
    "bleu": "Runs of one to four words that are those of the reference; higher is better.",
    "chrf": "Runs of one to six letters that are those of the reference; higher is better.",
    "rouge1": "Words shared with the reference; higher is better.",
    "rouge2": "Word pairs shared with the reference; higher is better.",
    "rougeL": "Longest sequence of words shared with the reference; higher is better.",
    "exact_match": "Share of answers that are the reference word for word; higher is better.",
    "numeric_match": "Share of answers with the reference's number; higher is better.",
    "bertscore": "Likeness to the reference, as another model sees it; higher is better.",
    "distinct_1": "Share of words that are different ones; it describes, neither way is better.",
    "distinct_2": "Share of word pairs that are different ones; it describes, neither way is better.",
    "length": "Mean number of words in an answer; it describes, neither way is better.",
    "stop_rate": "Share of answers that came to an end by themselves; higher is better.",
    "repetition": "Share of four-word runs that occurred before in the answer; lower is better.",
    "general": "Text that has nothing to do with your data: if this rises, it forgot some of what it knew.",
}
TONES = {"better": "good", "worse": "bad", "none": "flat", "open": "open"}
MIDDLE, REACH = 60, 54  # of an interval's picture, 120 wide: where zero is, and how far it reaches


def comparison(tree: dict[str, Any] | None) -> dict[str, Any] | None:
    """The comparison as the page shows it: rows with a meaning and a picture of the interval each, and examples."""
    if tree is None:
        return None
    rows = [*tree["metrics"], tree["general"] | {"name": "general"}]
    lines = [
        (line, MEANINGS.get(row["name"], ""), TONES[row["outcome"]], interval_svg(row))
        for line, row in zip(compared.table(tree), rows, strict=True)
    ]
    wins = tree["wins"]
    total = max(1, sum(wins.values()))
    return tree | {
        "lines": lines,
        "tone": TONES[tree["outcome"]],
        "shares": [(key, wins[key], 100 * wins[key] / total) for key in ("won", "tied", "lost")],
        "shown": [
            (title, [tree["examples"][index] for index in tree[key]])
            for title, key in (("Where it got better most", "best"), ("Where it got worse most", "worst"))
        ],
    }


def interval_svg(row: dict[str, Any]) -> Markup:
    """The difference as a point and its interval as a line, with zero in the middle; nothing where there is no interval."""
    if row["low"] is None or row["difference"] is None:
        return Markup("")
    most = max(abs(row["low"]), abs(row["high"]), abs(row["difference"])) or 1.0
    low, point, high = (MIDDLE + REACH * row[key] / most for key in ("low", "difference", "high"))
    return Markup(
        f'<svg class="interval {TONES[row["outcome"]]}" viewBox="0 0 120 16" aria-hidden="true">'
        f'<path class="zero" d="M{MIDDLE} 1V15"/><path d="M{low:.1f} 8H{high:.1f}"/>'
        f'<circle cx="{point:.1f}" cy="8" r="3.5"/></svg>'
    )


def measured(record: Record) -> list[tuple[str, str, str, str, str]]:
    """Predicted against measured: name, both values, what the prediction was off by, and a sentence."""
    plan, found = record.plan, record.figures
    time, told = plan.get("time") or {}, plan.get("measured") or {}
    peak = (told.get("peak_memory") or {}).get("measured")
    speed = found.tokens / found.seconds if found.seconds else None
    whole = isinstance(found.ended, Finished) and found.last_step == plan.get("steps")
    table: tuple[tuple[str, float | None, float | None, Any, str], ...] = (
        ("Peak memory", plan.get("peak_memory"), peak, words.size, "The most that the process held at any time."),
        ("Speed", time.get("tokens_per_second"), speed, _per_second, "Tokens that were read and learned from in a second."),
        (
            "Training time",
            time.get("training"),
            found.seconds if whole else None,
            words.duration,
            "Steps alone, without loading, evaluation and saving.",
        ),
    )
    return [
        (
            name,
            show(said) if said else "–",
            show(was) if was else "not yet",
            f"{said / was - 1:+.0%}" if said and was else "–",
            meaning,
        )
        for name, said, was, show, meaning in table
        if said or was
    ]


def _per_second(value: float) -> str:
    return f"{value:,.0f} tokens/s"


def standing(record: Record) -> tuple[str, str]:
    """How the run stands, in a word or two and a sentence; nothing for one that is finished."""
    ended, place, last = record.figures.ended, record.place, record.figures.last_step
    go_on = f" It can go on: finetune resume {place}." if record.resumable else ""
    if isinstance(ended, Finished):
        return "", ""
    if record.at_work and ended is None:
        then = f"If it has died since, finetune report {place} renews the page"
        return "At work", f"This page was written after step {last}, while the run went on. {then}."
    if ended is None:
        how = "It was killed, or the machine went off"
        return "Broken off", f"The run's process ended without a word after step {last}. {how}.{go_on}"
    if ended.code.startswith("STOP"):
        return "Stopped", f"Somebody stopped it: {ended.problem}.{go_on}"
    fix = f" What to do: {ended.fix}." if ended.fix else ""
    return "Failed", f"{ended.code}: {ended.problem}.{fix}{go_on}"


def sealed(folder: Path, names: list[str]) -> list[tuple[str, str, str]]:
    """The files of committed folders with size and SHA-256, as their manifests say; they are not read for that."""
    found = []
    for name in names:
        try:
            files = read_json(folder / name / MANIFEST)["files"]
            found += [(f"{name}/{file}", words.size(entry["size"]), str(entry["sha256"])) for file, entry in files.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found
