"""Base against tuned, from what both said: differences with intervals, wins and losses, and one sentence. Pure.

The result is plain values, for events.jsonl, eval_results.json and whoever draws a page of it:

    base, tuned, outcome (better | none | worse | open), sentence, primary (loss, or bits_per_byte between tokenizers)
    rows       measured, answered, of, why; of a comparison on other data also left_out (too long to be asked)
    decoding   the generation settings and the seed
    interval   method, level, resamples, seed
    metrics    one each: name, label, base, tuned, difference, low, high, better (1 | -1 | 0), outcome, signature, rows
    wins       won, lost, tied: rows whose loss per token is lower, higher or equal
    examples   one per answered prompt: row, place, prompt, reference, base and tuned (text, tokens,
               stopped, loss), change of the loss
    best, worst  indices of examples: where the tuned model's loss fell and rose most
    general    the forgetting guard: texts, base, tuned (bits per byte), difference, low, high, relative, outcome, sentence
    speed      of both: prompt tokens and decoded tokens per second
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_finetune_kit.evaluation.asking import Prompt
from llm_finetune_kit.evaluation.bootstrap import FEWEST, LEVEL, METHOD, RESAMPLES, Interval, paired_difference
from llm_finetune_kit.evaluation.losses import RowLosses
from llm_finetune_kit.evaluation.metrics import FROM_LOSS, Metric, Said, adds_up, share
from llm_finetune_kit.evaluation.sides import Side
from llm_finetune_kit.report import words

SHOWN = 3  # best and worst examples
NATS = math.log(2)
ONLY_ANSWERS = "Nobody can tell: there are no reference answers to measure against, only the answers to look at."
FORGOTTEN = ((0.03, "a little"), (0.1, "some"), (math.inf, "much"))  # shares below which bits per byte rose
OUTCOMES = {1: "better", 0: "none", -1: "worse"}
Row = dict[str, Any]


def compared(
    base: Side,
    tuned: Side,
    prompts: list[Prompt],
    metrics: Sequence[Metric],
    *,
    place: Callable[[int], str],
    why: str,
    of: int,
    decoding: Row,
    wanted: Sequence[str] | None = None,
    seed: int = 0,
) -> Row:
    """The comparison of two sides that were asked the same; `of` is how many prompts there were and `why` says why so few.

    `wanted` are names of metrics that need no answers (all of them if None).
    """
    common = sorted(set(base.losses.rows.tolist()) & set(tuned.losses.rows.tolist()))
    losses = base.losses.at(common), tuned.losses.at(common)
    same = base.tokenizer == tuned.tokenizer
    found = _from_losses(*losses, same=same, wanted=wanted, seed=seed) if common else []
    sides = [Said(one.answers, [prompt.reference for prompt in prompts]) for one in (base, tuned)]
    if prompts:
        found += [_from_answers(metric, *sides, seed=seed) for metric in metrics]
    primary = next((row for row in found if row["name"] == ("loss" if same else "bits_per_byte")), None)
    wins = _wins(*losses, same=same)
    examples = _examples(base, tuned, prompts, place)
    order = sorted((one["change"], index) for index, one in enumerate(examples) if one["change"] is not None)
    return {
        "base": base.name,
        "tuned": tuned.name,
        "outcome": primary["outcome"] if primary else "open",
        "sentence": _sentence(primary, wins, found) if primary else ONLY_ANSWERS,
        "primary": primary["name"] if primary else None,
        "rows": {"measured": len(common), "answered": len(prompts), "of": of, "why": why},
        "decoding": decoding,
        "interval": {"method": METHOD, "level": LEVEL, "resamples": RESAMPLES, "seed": seed},
        "metrics": found,
        "wins": wins,
        "examples": examples,
        "best": [index for change, index in order[:SHOWN] if change < 0],
        "worst": [index for change, index in reversed(order[-SHOWN:]) if change > 0],
        "general": _general(base.general, tuned.general, seed),
        "speed": {"base": _speed(base), "tuned": _speed(tuned)},
    }


# --- metrics -----------------------------------------------------------------------------------------------


def _row(name: str, label: str, better: int, values: tuple[float, float], found: Interval, signature: str, rows: int) -> Row:
    known = [value if math.isfinite(value) else None for value in values]
    outcome = "open" if found.low is None or not better else OUTCOMES[found.sign * better]
    return {
        "name": name,
        "label": label,
        "base": known[0],
        "tuned": known[1],
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "better": better,
        "outcome": outcome,
        "signature": signature,
        "rows": rows,
    }


def _from_losses(base: RowLosses, tuned: RowLosses, *, same: bool, wanted: Sequence[str] | None, seed: int) -> list[Row]:
    """Loss, perplexity and bits per byte; between tokenizers only the last can be compared."""
    by_token = base.sums(base.targets), tuned.sums(tuned.targets)
    by_byte = base.sums(base.bytes, NATS), tuned.sums(tuned.bytes, NATS)
    rows = []
    table = (
        ("loss", "Held-out loss", by_token, share, 0.0, "nats per target token, all tokens alike"),
        ("perplexity", "Perplexity", by_token, _perplexity, 1.0, "exp of the loss"),
        ("bits_per_byte", "Bits per byte", by_byte, share, 0.0, "loss over the UTF-8 bytes of the target text"),
    )
    for name, label, sums, total, least, meaning in table:
        if name in FROM_LOSS and wanted is not None and name not in wanted and (same or name != "bits_per_byte"):
            continue
        found = paired_difference(sums[0], sums[1], total, seed=seed, limits=(least, math.inf))
        values = (float(total(sums[0].sum(0))), float(total(sums[1].sum(0))))
        row = _row(name, label, -1, values, found, f"llm-finetune-kit|{meaning}", len(base))
        if not same and name != "bits_per_byte":
            row |= {"difference": None, "low": None, "high": None, "outcome": "open"}
        rows.append(row)
    return rows


def _perplexity(sums: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(np.minimum(share(sums), 700.0))
    return found


def _from_answers(metric: Metric, base: Said, tuned: Said, *, seed: int) -> Row:
    values = metric.value(base), metric.value(tuned)
    found = Interval(values[1] - values[0] if all(map(math.isfinite, values)) else None)
    if adds_up(metric, base, tuned):
        assert metric.rows is not None and metric.total is not None
        found = paired_difference(metric.rows(base), metric.rows(tuned), metric.total, seed=seed, limits=metric.limits)
    return _row(metric.name, metric.label, metric.better, values, found, metric.signature(), len(base.references))


# --- rows --------------------------------------------------------------------------------------------------


def _per_token(losses: RowLosses) -> dict[int, float]:
    return dict(zip(losses.rows.tolist(), (losses.loss / losses.targets).tolist(), strict=True))


def _wins(base: RowLosses, tuned: RowLosses, *, same: bool) -> dict[str, int]:
    size = ("targets", "targets") if same else ("bytes", "bytes")
    before, after = (side.loss / np.maximum(getattr(side, name), 1) for side, name in zip((base, tuned), size, strict=True))
    return {"won": int((after < before).sum()), "lost": int((after > before).sum()), "tied": int((after == before).sum())}


def _examples(base: Side, tuned: Side, prompts: list[Prompt], place: Callable[[int], str]) -> list[Row]:
    before, after = _per_token(base.losses), _per_token(tuned.losses)
    found = []
    for prompt, ours, theirs in zip(prompts, base.answers, tuned.answers, strict=True):
        pair = before.get(prompt.row), after.get(prompt.row)
        found.append(
            {
                "row": prompt.row,
                "place": words.name(place(prompt.row)),
                "prompt": prompt.text,
                "reference": prompt.reference,
                "base": vars(ours) | {"loss": pair[0]},
                "tuned": vars(theirs) | {"loss": pair[1]},
                "change": pair[1] - pair[0] if pair[0] is not None and pair[1] is not None else None,
            }
        )
    return found


def _speed(side: Side) -> dict[str, float | None]:
    """Tokens per second of reading prompts and of writing answers, apart."""
    speed = side.speed
    return {
        "prefill": speed.prompt_tokens / speed.prefill_seconds if speed.prefill_seconds else None,
        "decode": speed.decoded_tokens / speed.decode_seconds if speed.decode_seconds else None,
    }


# --- words -------------------------------------------------------------------------------------------------


def _sentence(primary: Row, wins: dict[str, int], metrics: list[Row]) -> str:
    what = "held-out loss" if primary["name"] == "loss" else "bits per byte"
    rows = wins["won"] + wins["lost"] + wins["tied"]
    if primary["low"] is None:
        fewer = f"an interval takes {FEWEST} rows" if rows < FEWEST else "it has no interval"
        return f"Nobody can tell: {what} went from {primary['base']:.3f} to {primary['tuned']:.3f} on {rows} rows, and {fewer}."
    moved = f"{what} {_moved(primary)} on {rows:,} rows ({primary['low']:+.3f} to {primary['high']:+.3f} with 95 % confidence)"
    counts = f"{wins['won']:,} rows got better, {wins['lost']:,} worse"
    if primary["outcome"] == "none":
        return f"No difference shown: {moved}, which may be chance; {counts}."
    return f"{'Better' if primary['outcome'] == 'better' else 'Worse'}: {moved}; {counts}.{_but(primary, metrics)}"


def _but(primary: Row, metrics: list[Row]) -> str:
    """What the answers themselves show against the loss, so that nobody reads the first word alone."""
    other = "worse" if primary["outcome"] == "better" else "better"
    against = [row["label"] for row in metrics if row["outcome"] == other]
    return f" But shown to be {other}: {', '.join(against)}." if against else ""


def _moved(row: Row) -> str:
    if row["difference"] == 0:
        return f"stayed at {row['base']:.3f}"
    return f"{'fell' if row['difference'] < 0 else 'rose'} from {row['base']:.3f} to {row['tuned']:.3f}"


def _general(base: RowLosses, tuned: RowLosses, seed: int) -> Row:
    """How much worse the tuned model predicts general text, per byte."""
    common = sorted(set(base.rows.tolist()) & set(tuned.rows.tolist()))
    base, tuned = base.at(common), tuned.at(common)
    sums = base.sums(base.bytes, NATS), tuned.sums(tuned.bytes, NATS)
    found = paired_difference(sums[0], sums[1], share, seed=seed, limits=(0.0, math.inf))
    before, after = (float(share(one.sum(0))) for one in sums)
    row = _row("general", "General text, bits per byte", -1, (before, after), found, "", len(common))
    relative = (after - before) / before if before > 0 else None
    kept = {key: row[key] for key in ("base", "tuned", "difference", "low", "high", "outcome")}
    return {"texts": len(common), **kept, "relative": relative, "sentence": _drift(row, relative, len(common))}


def _drift(row: Row, relative: float | None, texts: int) -> str:
    if relative is None or row["outcome"] == "open":
        return f"Whether it forgot what it knew cannot be told from {texts} texts."
    low, high = row["low"] / row["base"], row["high"] / row["base"]
    sure = f"{relative:+.1%}, with 95 % confidence {low:+.1%} to {high:+.1%}"
    change = f"bits per byte on {texts} general texts went from {row['base']:.3f} to {row['tuned']:.3f} ({sure})"
    if row["outcome"] == "worse":
        return f"It forgot {_grade(relative)} of what it knew: {change}."
    return f"No forgetting shown: {change}."


def _grade(relative: float) -> str:
    """How much was forgotten, by how much more surprising general text has become."""
    return next(word for most, word in FORGOTTEN if relative < most)
