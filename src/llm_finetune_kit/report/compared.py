"""A comparison (see evaluation.comparison) as tables: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

from typing import Any

from llm_finetune_kit.report import words

HEAD = ("held-out rows", "base", "tuned", "difference", "95 % interval", "")
CSV_HEAD = ["metric", "base", "tuned", "difference", "low", "high", "outcome"]
MARKS = {"better": "better", "worse": "worse", "none": "no difference shown", "open": "–"}
IN_CSV = {"loss": "held_out_loss"}  # names that stood there before there were intervals
LONGEST = 600  # letters of an answer in comparison.md; eval_results.json has all of it


def table(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per metric under HEAD, and one for the general texts."""
    general = comparison["general"] | {"label": "General text, bits per byte"}
    return [_line(row) for row in (*comparison["metrics"], general)]


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    show = words.perplexity if row.get("name") == "perplexity" else words.loss
    interval = "–" if row["low"] is None else f"{_signed(row['low'])} to {_signed(row['high'])}"
    change = "–" if row["difference"] is None else _signed(row["difference"])
    return row["label"], show(row["base"]), show(row["tuned"]), change, interval, MARKS[row["outcome"]]


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}" if abs(value) < 100 else f"{value:+,.0f}"


def csv_rows(rows: list[list[Any]], comparison: dict[str, Any] | None) -> list[list[Any]]:
    """The rows filled up to CSV_HEAD with the comparison's intervals, and its other metrics after them."""
    empty = [None] * (len(CSV_HEAD) - 3)
    if comparison is None:
        return [row + empty for row in rows]
    found = {IN_CSV.get(one["name"], one["name"]): one for one in comparison["metrics"]}
    found["general_bits_per_byte"] = comparison["general"]
    filled = [row + ([found[row[0]][key] for key in CSV_HEAD[3:]] if row[0] in found else empty) for row in rows]
    known = {row[0] for row in rows}
    return filled + [[name, *(one[key] for key in CSV_HEAD[1:])] for name, one in found.items() if name not in known]


def markdown(comparison: dict[str, Any]) -> list[str]:
    """The comparison as paragraphs of `comparison.md`."""
    rows, wins = comparison["rows"], comparison["wins"]
    lines = [[words.markdown_cell(cell) for cell in line] for line in table(comparison)]
    told = [
        f"Rows whose loss fell: {wins['won']:,}, rose: {wins['lost']:,}, same: {wins['tied']:,}.",
        f"{rows['answered']:,} of {rows['of']:,} prompts were answered by both ({words.markdown_cell(rows['why'])}).",
        f"Intervals: {comparison['interval']['method']}.",
    ]
    parts = [
        "## With what certainty",
        words.markdown_cell(comparison["sentence"]),
        words.markdown_cell(comparison["general"]["sentence"]),
        words.markdown_table([*HEAD[:-1], "outcome"], lines),
        " ".join(told),
    ]
    for title, key in (("Where it got better most", "best"), ("Where it got worse most", "worst")):
        if comparison[key]:
            parts += [f"### {title}", _examples([comparison["examples"][index] for index in comparison[key]])]
    parts.append("Measured by: " + "; ".join(f"{one['label']}: `{one['signature']}`" for one in comparison["metrics"]))
    return parts


def _examples(examples: list[dict[str, Any]]) -> str:
    head = ["row", "loss, base to tuned", "prompt", "base", "tuned", "reference"]
    lines = []
    for one in examples:
        texts = [one["prompt"], one["base"]["text"], one["tuned"]["text"], one["reference"]]
        moved = f"{one['base']['loss']:.3f} to {one['tuned']['loss']:.3f}"
        lines.append([words.markdown_cell(one["place"]), moved, *(words.markdown_cell(_short(text)) for text in texts)])
    return words.markdown_table(head, lines)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} …"
