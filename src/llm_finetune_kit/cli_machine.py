"""`finetune models` and `doctor`: what this machine can do, and what is wrong with it. Holds no logic of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_finetune_kit.cli_texts import parser_of
from llm_finetune_kit.errors import MachineError


def models_command(words: list[str]) -> int:
    """`finetune models`; returns the exit code."""
    parser = parser_of("models", "list the models that have a short name, and what fits here")
    parser.add_argument("--on", metavar="MACHINE", help="look what fits another machine")
    parser.add_argument("--fits", action="store_true", help="only models that can be fine-tuned there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_all(words)
    from llm_finetune_kit.hardware import machine_named, this_machine
    from llm_finetune_kit.models.known import rows

    machine = machine_named(asked.on) if asked.on else this_machine()
    found = [row for row in rows(machine) if not asked.fits or row["fits"] != "no"]
    if asked.json:
        print(json.dumps(found, indent=2))
        return 0
    from llm_finetune_kit.terminal import WIDE, print_pairs, print_table, show, width

    heads = ("name", "weights", "GPU memory", "takes", "licence", "hub id")
    shown = len(heads) if width() >= WIDE else len(heads) - 1
    print_table(heads[:shown], [_shown(row)[:shown] for row in found])
    show("" if found else f"none of the known models can be fine-tuned on {machine.name}\n")
    takes = "LoRA; with recompute (LoRA, activations computed twice); QLoRA (4 bits); no"
    means = [
        ("GPU memory", "the least and the recommended for adapters, by a rule of thumb", ""),
        ("takes", f"reckoned for {machine.name}, adapters of rank 16 and rows of 512 tokens: {takes}", ""),
        ("licence", "* not for commercial use; gated: to be accepted on the hub first", ""),
        ("others", "any other hub id or local folder works too", "--json has hub ids and templates"),
    ]
    print_pairs(means)
    return 0


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    four = ", 4 bits" if row["quantization"] == "required" else ""
    memory = f"{row['minimum_gb']}-{row['recommended_gb']} GB{four}"
    licence = f"{row['license']}{', gated' if row['gated'] else ''}{'' if row['commercial'] else ' *'}"
    return row["name"], _count(row["parameters"]), memory, row["fits"], licence, row["hub_id"] or "in the package"


def doctor_command(words: list[str]) -> int:
    """`finetune doctor`; returns the exit code, which is not 0 where training would fail."""
    parser = parser_of("doctor", "find what is wrong with this machine, and how to mend it")
    parser.add_argument("--output-dir", default="outputs", help="folder that will hold the runs")
    parser.add_argument("--online", action="store_true", help="ask the hub for an answer, too")
    parser.add_argument("--deep", action="store_true", help="import torch and the extras, too, which takes some seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_all(words)
    from llm_finetune_kit.doctor import examine

    found = examine(Path(asked.output_dir), online=asked.online, deep=asked.deep)
    worst = MachineError.exit_code if any(check.status == "fail" for check in found) else 0
    if asked.json:
        print(json.dumps([vars(check) for check in found], indent=2))
        return worst
    from llm_finetune_kit.terminal import print_table, show

    print_table(("", "what", "found", "fix"), [(check.status, check.name, check.finding, check.fix) for check in found])
    count = sum(check.status != "ok" for check in found)
    show(f"\n{count} of {len(found)} need a look" if count else "\nnothing is wrong", style="bold")
    return worst


def _count(number: int) -> str:
    """1,100,048,384 as `1.1 B`."""
    if number >= 999_500_000:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.0f} M" if number >= 10_000_000 else f"{number / 1e6:.1f} M"
