"""The evidence of a run, written into its folder: every file is a function of what the run recorded."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_finetune_kit.files import write_bytes, write_json, write_whole
from llm_finetune_kit.report import compared, words
from llm_finetune_kit.report.figures import caution, legible
from llm_finetune_kit.report.log import run_log
from llm_finetune_kit.report.page import write_page
from llm_finetune_kit.report.plots import loss_curve
from llm_finetune_kit.report.record import Record, read_record


def write_report(folder: Path) -> None:
    """Write or renew all evidence in a run folder, however far the run came; each file whole or not at all."""
    record = read_record(folder)
    write_json(folder / "eval_results.json", results(record))
    write_whole(folder / "eval_results.csv", words.csv_table(metrics(record)))
    write_whole(folder / "comparison.md", legible(comparison(record)))
    write_bytes(folder / "loss_curve.png", loss_curve(record.figures, record.verdict.headline))
    write_whole(folder / "run.log", run_log(folder, record.knobs.get("training", {}).get("logging_steps", 1)))
    write_page(folder, record)


def results(record: Record) -> dict[str, Any]:
    """`eval_results.json`: held-out results over steps, base against tuned, and paired answers."""
    found = record.figures
    tree: dict[str, Any] = {
        "run": record.name,
        "base_model": record.base,
        "verdict": asdict(record.verdict),
        "finished": found.kept is not None,
        "step": found.shown,
        "before_and_after": found.compared,
        "evaluations": [asdict(event) for event in found.held_out],
        "samples": [asdict(pair) for pair in found.pairs],
        "comparison": found.comparison,
    }
    return {key: _finite(value) for key, value in tree.items()}


def _finite(tree: Any) -> Any:
    """The same tree with null for what JSON cannot say: infinity and not-a-number."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def metrics(record: Record) -> list[list[Any]]:
    """`eval_results.csv`: a row per metric; an empty cell is not known."""
    found, known = record.figures, record.figures.compared
    by_step = {event.step: event for event in found.held_out}
    base, tuned = by_step.get(0), by_step.get(found.shown) if found.shown else None
    rows = [
        ["held_out_loss", known.get("loss_before"), known.get("loss_after")],
        ["perplexity", known.get("perplexity_before"), known.get("perplexity_after")],
        ["held_out_rows", base and base.rows, tuned and tuned.rows],
        ["held_out_target_tokens", base and base.target_tokens, tuned and tuned.target_tokens],
        ["step", base and base.step, tuned and tuned.step],
    ]
    return [compared.CSV_HEAD, *compared.csv_rows(rows, found.comparison)]


def write_comparison(folder: Path, found: dict[str, Any]) -> None:
    """A comparison by itself (see `evaluation.comparison`) in the files that a run leaves of its own, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "eval_results.json", _finite({"comparison": found}))
    write_whole(folder / "eval_results.csv", words.csv_table([compared.CSV_HEAD, *compared.csv_rows([], found)]))
    names = " against ".join(words.markdown_cell(words.name(str(found[side]))) for side in ("tuned", "base"))
    parts = ["# Base against tuned", f"{names}.", *compared.markdown(found)]
    write_whole(folder / "comparison.md", legible("\n\n".join(parts) + "\n"))


def comparison(record: Record) -> str:
    """`comparison.md`: base against tuned in figures and side by side in answers."""
    found, known = record.figures, record.figures.compared
    rows = [
        ["Held-out loss", words.loss(known.get("loss_before")), words.loss(known.get("loss_after"))],
        ["Perplexity", words.perplexity(known.get("perplexity_before")), words.perplexity(known.get("perplexity_after"))],
    ]
    step = f"Tuned (step {found.shown})" if found.shown is not None else "Tuned"
    parts = [
        "# Base against tuned",
        f"**{words.markdown_cell(record.verdict.sentence)}.** {caution(found)}".strip(),
        words.markdown_table(["", "Base", step], rows),
        "Loss is the mean surprise per learned token of held-out rows; perplexity is e to that power. Lower is better.",
        *(compared.markdown(found.comparison) if found.comparison is not None else ()),
        "## Answers",
    ]
    for number, pair in enumerate(found.pairs, 1):
        answers = [words.markdown_cell(text if text is not None else "(not asked)") for text in (pair.before, pair.after)]
        reference = words.markdown_cell(pair.reference) if pair.reference else "(none)"
        parts += [f"### {number}", words.markdown_table(["Prompt"], [[words.markdown_cell(pair.prompt)]])]
        parts.append(words.markdown_table(["Base", "Tuned", "Reference"], [[*answers, reference]]))
    if not found.pairs:
        parts.append("No answers were recorded.")
    return "\n\n".join(parts) + "\n"
