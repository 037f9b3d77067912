"""Pieces of the page as HTML. Every text is escaped by the template: what a user or a model wrote is never markup."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from llm_finetune_kit.data.quality.findings import KINDS
from llm_finetune_kit.errors import KitError, MachineError
from llm_finetune_kit.report import words
from llm_finetune_kit.report.figures import legible
from llm_finetune_kit.report.templates import templates

TONES = {"LoRA": "good", "with recompute": "good", "QLoRA": "flat", "no": "bad"}
MEANS = {
    "LoRA": "LoRA fits on this machine.",
    "with recompute": "LoRA fits on this machine if activations are computed twice, which is slower.",
    "QLoRA": "It fits on this machine with its weights in 4 bits (QLoRA).",
    "no": "It does not fit on this machine.",
}
MOST_PARTS = 5  # of the memory that have a colour of their own
SAID = re.compile(r"error\[([A-Z]+)-(\d+)\] (.*?)(?:\n  why:  (.*?))?(?:\n  fix:  (.*?))?(?:\n\S|\Z)", re.DOTALL)


@cache
def _parts() -> Any:
    environment = templates("assets/ui")
    environment.filters |= {"size": words.size, "count": count, "said": words.value, "short": words.name}
    return environment.get_template("parts.html.jinja").module


def piece(name: str, *values: Any) -> str:
    """One macro of parts.html.jinja with these values."""
    return legible(str(getattr(_parts(), name)(*values)))


def error(fault: KitError, fields: Sequence[str] = ()) -> str:
    """A fault as the page shows it: the problem, why, and what to do. The controls of the ids `fields` are marked."""
    return piece("error", fault) + (piece("marked", fields) if fields else "")


def hint(title: str, text: str) -> str:
    """What stands where nothing is to be seen yet."""
    return piece("hint", title, text)


def fault_in(said: str, name: str) -> KitError:
    """The error block at the end of what a command line said, or one that quotes its last line."""
    found = list(SAID.finditer(said))
    if found:
        kind, number, problem, why, fix = found[-1].groups()
        return fault_of(f"{kind}-{number}", problem, why or "", fix or "")
    last = next((line for line in reversed(said.strip().split("\n")) if line.strip()), "it said nothing")
    return MachineError(53, f"{name} ended before it began", why=last, fix="look at this machine: finetune doctor")


def fault_of(code: str, problem: str, why: str, fix: str) -> KitError:
    """An error that was told elsewhere, with its code."""
    kind, _, number = code.partition("-")
    fault = KitError(int(number or "0"), problem.strip(), why=why.strip(), fix=fix.strip())
    fault.kind = kind
    return fault


def count(number: float) -> str:
    """1,100,048,384 as `1.1 B`, 4,492,032 as `4.5 M`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * scale:
            return f"{number / scale:.1f} {unit}" if number < 100 * scale else f"{number / scale:.0f} {unit}"
    return f"{number:.0f}"


def model(name: str, row: dict[str, Any] | None, plan: dict[str, Any] | None) -> str:
    """A model: what it is, whether fine-tuning it fits this machine, and why."""
    tiles = []
    if row is not None:
        four = ", in 4 bits" if row["quantization"] == "required" else ""
        commercial = "commercial use allowed" if row["commercial"] else "not for commercial use"
        gated = "to be accepted on the hub first" if row["gated"] else commercial
        tiles = [
            ("Weights", count(row["parameters"]), row["hub_id"] or "inside the package"),
            ("Licence", row["license"], gated),
            ("On a GPU", f"{row['minimum_gb']}–{row['recommended_gb']} GB{four}", "by a rule of thumb"),
        ]
    seen = _planned(plan) if plan else None
    if seen is not None:
        tiles += [("Memory here", words.size(seen["needed"]), f"of {words.size(seen['available'])} free")]
    fits = row["fits"] if row is not None else "LoRA"
    verdict = MEANS[fits] if seen is None or seen["fits"] else MEANS["no"]
    tone = TONES[fits] if seen is None or seen["fits"] else "bad"
    return piece("model", name, row, seen, {"tiles": tiles, "verdict": verdict, "tone": tone})


def models(rows: list[dict[str, Any]]) -> str:
    """All known models and what each takes here."""
    return piece("models", [row | {"tone": TONES[row["fits"]]} for row in rows])


def plan(found: dict[str, Any], said: list[str]) -> str:
    """The plan of a run: memory, time and cost, each choice with its reason, and the command that does the same."""
    seen = _planned(found)
    time, cost = found["time"], found["cost"]
    speed = f"{time['tokens_per_second']:,.0f} tokens/s, {time['source']}" if time else "this machine was not measured"
    price = f"${cost['price_per_hour']:.2f} an hour, {cost['source']}" if cost else "your own machine has no price here"
    tiles = [
        ("Memory", words.size(seen["needed"]), f"of {words.size(seen['available'])} free"),
        ("Time", words.duration(time["total"]) if time else "not known", speed),
        ("Cost", _dollars(cost), price),
        ("Steps", f"{found['steps']:,}", f"of {found['examples_per_step']:,} examples"),
        ("Trained weights", count(found["trained_parameters"]), found["config"]["method"]),
        ("Disk", words.size(sum(found["disk"].values())), "for checkpoints and result"),
    ]
    verdict = "It fits." if seen["fits"] else "It does not fit as it is."
    command = shlex.join(["finetune", "train", *said])
    return piece("plan", seen | {"tiles": tiles, "verdict": verdict, "warnings": found["warnings"], "command": command})


def _planned(found: dict[str, Any]) -> dict[str, Any]:
    parts = sorted(found["memory"].items(), key=lambda part: -part[1])
    needed, available = found["needed_memory"], found["available_memory"]
    shown = [*parts[:MOST_PARTS], ("others", sum(size for _, size in parts[MOST_PARTS:]))]
    return {
        "parts": [part for part in shown if part[1]],
        "available": available,
        "needed": needed,
        "fits": needed <= available,
        "choices": found["choices"],
    }


def _dollars(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return "none"
    return f"${cost['total']:.2f}" if cost["total"] >= 0.01 else "< $0.01"


def xray(found: Any) -> str:
    """The mask X-ray of some examples, and whether the gate lets the data pass."""
    if found is None:
        return hint("No X-ray", "Choose a model, or data with answers to learn.")
    refused = fault_in(found.gate, "training") if found.gate else None
    return piece("xray", Markup(found.fragment()), refused, found.verdict, found.warnings)


def data_report(checked: Any) -> str:
    """The quality report: the format, the figures, and each finding with what to do about it."""
    report = checked.report.to_dict()
    from llm_finetune_kit.report.data_page import MEANING, TONES, share, tiles

    findings = [
        (one, KINDS[one["kind"]].title, TONES[one["severity"]], MEANING[one["severity"]], share(one["share"]))
        for one in report["findings"]
    ]
    worst = report["findings"][0]["severity"] if report["findings"] else "note"
    tone = "good" if worst == "note" else TONES[worst]
    told = f"Read as {checked.format}: {checked.why_format}."
    return piece("data", report, told, findings, tiles(report), tone)
