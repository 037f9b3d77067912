"""The catalog as `finetune models` shows it: what each model is, and how it fits a machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llm_finetune_kit.catalog import MODELS
from llm_finetune_kit.models.facts import facts_by_name


def rows(machine: Any = None) -> list[dict[str, Any]]:
    """One row per model of the catalog, smallest first, as plain values.

    With a `hardware.Machine` each row also says under `fits` what fine-tuning it takes there: `LoRA`,
    `with recompute`, `QLoRA`, or `no`.
    """
    found = []
    for name, model in sorted(MODELS.items(), key=lambda item: item[1].parameters):
        row = {"name": name} | asdict(model) | asdict(model.memory)
        found.append(row if machine is None else row | {"fits": _fits(name, machine)})
    return found


def _fits(name: str, machine: Any) -> str:
    from llm_finetune_kit.plan import fits

    return fits(facts_by_name(name), machine)
