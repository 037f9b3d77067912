"""`report.html`: the whole run in one file that needs no network and no scripts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llm_finetune_kit import config
from llm_finetune_kit.data.xray import Totals, XrayExample, XrayToken
from llm_finetune_kit.events import Finished
from llm_finetune_kit.files import write_whole
from llm_finetune_kit.report import evidence, words
from llm_finetune_kit.report.card import HUB_ID, base_licence, data_licence, loading_code
from llm_finetune_kit.report.curve import loss_svg
from llm_finetune_kit.report.figures import Figures, caution, legible
from llm_finetune_kit.report.log import in_words
from llm_finetune_kit.report.record import Record, read_record
from llm_finetune_kit.report.small_curves import small_curves
from llm_finetune_kit.report.templates import templates
from llm_finetune_kit.report.xray_views import xray_html

FILES = {
    "config.yaml": "what was asked",
    "resolved.json": "every value that was used, with versions and the data's fingerprints",
    "plan.json": "what was decided and predicted",
    "data_report.json": "what the data is like",
    "events.jsonl": "everything the run said, one line each",
    "run.log": "the same for people",
    "debug.log": "details of errors",
    "eval_results.json": "held-out results over time and sample answers",
    "eval_results.csv": "base against tuned, as a table",
    "comparison.md": "base against tuned, to read",
    "loss_curve.png": "the loss curve as a picture",
    "report.html": "this page",
    "final": "the trained weights with tokenizer and model card: this is what you use",
}

PARTS = {
    "weights": "the model itself",
    "adapter": "the small matrices that are trained",
    "gradients": "in which direction each trained weight should move",
    "optimizer": "two running means per trained weight (AdamW)",
    "loss head": "working space to score the vocabulary",
    "libraries": "PyTorch and its companions",
    "kernels": "what the processor's matrix code keeps ready",
    "activations": "what each layer remembers for the backward pass",
    "attention": "working space to relate tokens to each other",
    "tokenizer and data": "the vocabulary and the examples",
    "weight copies": "weights in the format that products are computed in",
    "gaps": "memory that is free but scattered",
}


def write_page(folder: Path, record: Record | None = None) -> None:
    """Write or renew `report.html` of a run, however far it came; the whole file or not at all."""
    write_whole(folder / "report.html", page(record or read_record(folder), folder))


def page(record: Record, folder: Path) -> str:
    """The report as HTML; every text that a model, a data set or a user wrote is escaped."""
    environment = templates("assets")
    environment.filters |= {
        "loss": words.loss,
        "perplexity": words.perplexity,
        "size": words.size,
        "duration": words.duration,
    }
    found = record.figures
    html = environment.get_template("report.html.jinja").render(
        run=record,
        found=found,
        tiles=_tiles(record),
        caution=caution(found),
        curves=[("wide", loss_svg(found, 760, 320)), ("narrow", loss_svg(found, 360, 280))],
        finished=isinstance(found.ended, Finished),
        asked=_asked(record.asked),
        decided=[
            (choice["knob"], words.value(choice["value"]), choice["reason"], _meaning(choice["knob"]))
            for choice in record.plan.get("choices", [])
            if choice["reason"] != "you asked for it"
        ],
        memory=_memory(record.plan),
        sources=_sources(record.data),
        masks=_masks(record.data),
        xray=_xray(record.data),
        cut=_cut(record.data),
        local=not HUB_ID.fullmatch(record.base_name),
        files=_files(folder),
        hashes=evidence.sealed(folder, ["final", *(path.name for path in _checkpoints(folder))]),
        versions=record.resolved.get("versions", {}),
        compared=evidence.comparison(found.comparison),
        measured=evidence.measured(record),
        standing=evidence.standing(record),
        history=[in_words(event) for event in record.interruptions],
        small=small_curves(list(found.steps), record.plan.get("peak_memory")),
        code=loading_code(str(record.knobs.get("method", "lora")), record.base_name) if found.kept is not None else "",
        licence=base_licence(record.base_name),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    return legible(html)


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, and one sentence for a learner."""
    found, compared = record.figures, record.figures.compared
    tiles = []
    for name, kind, show, meaning in (
        ("Held-out loss", "loss", words.loss, "Surprise per token on rows it never trained on. Lower is better."),
        ("Perplexity", "perplexity", words.perplexity, "Among about how many equally likely tokens it hesitates."),
    ):
        if f"{kind}_after" in compared:
            tiles.append((name, f"{show(compared.get(f'{kind}_before'))} → {show(compared[f'{kind}_after'])}", meaning))
    if found.train:
        tiles.append(("Steps", _steps(found), f"Each step learned from {record.plan.get('examples_per_step', 'some')} examples."))
        speed = found.tokens / max(found.seconds, 1e-9)
        tiles.append(
            (
                "Training time",
                words.duration(found.seconds),
                f"{speed:,.0f} tokens per second on {_device(record.plan)}.",
            )
        )
    trained = record.plan.get("trained_parameters")
    if trained:
        how = (
            "All weights were trained."
            if record.knobs.get("method") == "full"
            else "Small LoRA matrices; the base stayed as it was."
        )
        tiles.append(("Trained weights", f"{trained:,}", how))
    return tiles


def _steps(found: Figures) -> str:
    return f"{found.last_step:,}" if found.last_step == found.total_steps else f"{found.last_step:,} of {found.total_steps:,}"


def _device(plan: dict[str, Any]) -> str:
    device = str(plan.get("device", "this machine"))
    return "the CPU" if device == "cpu" else device


def _asked(tree: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(knob, words.value(value), _meaning(knob)) for knob, value in _leaves(tree)]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _meaning(knob: str) -> str:
    field = config.knobs().get(knob)
    return str(field.description).replace("`", "") if field is not None else ""


def _memory(plan: dict[str, Any]) -> dict[str, Any] | None:
    parts, free = plan.get("memory"), plan.get("available_memory")
    if not parts or not free:
        return None
    peak, largest = sum(parts.values()), max(parts.values())
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return {
        "parts": [(name, size, 100 * size / max(1, largest), PARTS.get(name, "")) for name, size in ordered],
        "peak": peak,
        "free": free,
        "share": min(100, 100 * peak / max(1, free)),
        "fits": plan.get("needed_memory", peak) <= free,
    }


def _sources(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The data files: rows, what was dropped and why."""
    found = []
    for role, key in (("Training", "train"), ("Held out", "held_out")):
        part = data.get(key)
        if not part:
            continue
        dropped = part.get("dropped", [])
        places: dict[str, list[str]] = {}
        for row in dropped:
            places.setdefault(row["reason"], []).append(words.name(str(row["place"])))
        found.append(
            {
                "role": role,
                "name": words.name(str(part.get("name", ""))),
                "rows": part.get("rows", 0),
                "examples": part.get("examples", 0),
                "format": part.get("format", ""),
                "why": part.get("why_format", ""),
                "dropped": [
                    (reason, count, places[reason][:3])
                    for reason, count in Counter(row["reason"] for row in dropped).most_common()
                ],
                "dropped_count": part.get("dropped_count", len(dropped)),
                "repeated": part.get("repeated", 0),
                "near_copies": part.get("near_copies", 0),
                "licence": data_licence(str(part.get("name", "")), part.get("licence")),
                "notes": part.get("notes", []),
            }
        )
    return found


def _masks(data: dict[str, Any]) -> dict[str, Any] | None:
    masks = data.get("masks")
    if not masks or not masks.get("tokens"):
        return None
    share = 100 * masks["target_tokens"] / masks["tokens"]
    return {**masks, "share": share, "held_out_from": words.name(str(masks.get("held_out_from", "none")))}


def _xray(data: dict[str, Any]) -> Markup | None:
    """The first training examples, token by token."""
    kept = data.get("xray")
    if not kept:
        return None
    examples = [XrayExample(one["row"], [XrayToken(*token) for token in one["tokens"]]) for one in kept["examples"]]
    return Markup(xray_html(examples, Totals(**kept["totals"]), [words.name(one["place"]) for one in kept["examples"]]))


def _cut(data: dict[str, Any]) -> str:
    """How much of the examples is lost at the length limit."""
    totals = (data.get("xray") or {}).get("totals")
    if not totals:
        return ""
    if not totals["cut_examples"]:
        return "No example is cut at the length limit."
    return (
        f"{totals['cut_examples']:,} of {totals['examples']:,} examples are cut at the length limit: "
        f"{totals['cut_tokens']:,} tokens are lost, {totals['cut_trained']:,} of them of answers."
    )


def _files(folder: Path) -> list[tuple[str, str, str]]:
    """What lies in the run folder: name, meaning, size; this page's own size is not known yet."""
    meanings = FILES | {path.name: "weights and optimizer state, to go on from" for path in _checkpoints(folder)}
    found = [("report.html", meanings.pop("report.html"), "")]
    for name, meaning in meanings.items():
        path = folder / name
        if path.exists():
            found.append((name + "/" * path.is_dir(), meaning, words.size(_bytes(path))))
    return found


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=_checkpoint_step)


def _checkpoint_step(path: Path) -> tuple[int, str]:
    step = path.name.rpartition("-")[2]
    return (int(step) if step.isdecimal() else 0, path.name)


def _bytes(path: Path) -> int:
    """Size of a file or a folder; what is removed meanwhile, as old checkpoints are, counts nothing."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total
