"""The plan of a run that is not started: on this machine or another, with data or without, reckoned or probed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.prepare import is_named
from llm_finetune_kit.errors import ConfigError
from llm_finetune_kit.events import Listen, Noted, Planned, ignore
from llm_finetune_kit.hardware import machine_named, this_machine
from llm_finetune_kit.material import prepare_run
from llm_finetune_kit.models.facts import facts_by_name, model_facts
from llm_finetune_kit.models.locate import check_name, locate
from llm_finetune_kit.plan import DataFacts, Plan, make_plan

ASSUMED = DataFacts(examples=1_000, held_out=50, tokens=200_000, target_tokens=100_000, longest=512)
SAID = "no data is named: reckoned with 1,000 examples of 200 tokens on average, half of them learned, the longest of 512"


def plan_run(
    config: RunConfig,
    listen: Listen = ignore,
    *,
    on: str | None = None,
    price: float | None = None,
    force: bool = False,
    probed: bool = False,
) -> Plan:
    """What a config would do and need. `on` names another machine, `price` is in dollars an hour.

    Without data nothing is read but the model's shape, which is known for the models of the catalog. `probed` runs
    some of its steps here and puts the plan on their ground. Raises what `prepare_run` raises.
    """
    if on is not None and probed:
        raise ConfigError(14, "a probe runs here, so it tells nothing of another machine", fix="leave out --on or --probe")
    machine = machine_named(on) if on is not None else this_machine(Path(config.output.output_dir))
    if not is_named(config.data):
        if probed:
            raise ConfigError(14, "a probe needs data", where="data.train_file", fix="for example --data train.jsonl")
        return _without_data(config, machine, listen, price=price, force=force)
    material = prepare_run(config, ignore if probed else listen, machine=machine, price=price, force=force)
    if not probed:
        return material.plan
    from llm_finetune_kit.probe import probe

    measured = probe(material)
    plan = make_plan(config, machine, material.model, material.facts, force=force, measured=measured, price=price)
    listen(Planned(plan.to_dict() | {"machine": machine.name}))
    told = f"{measured.steps} steps of {measured.step_tokens:,.0f} tokens on average took {measured.step_seconds:.2f} s each"
    listen(Noted(f"probed in {measured.seconds:.0f} s: {told}"))
    return plan


def _without_data(config: RunConfig, machine: Any, listen: Listen, *, price: float | None, force: bool) -> Plan:
    if config.model.name is None:
        raise ConfigError(5, "no model is named", where="model.name", fix="for example --model mistral-7b")
    plan = make_plan(config, machine, _shape(config), ASSUMED, force=force, price=price)
    listen(Planned(plan.to_dict() | {"machine": machine.name}))
    for warning in (SAID, *plan.warnings):
        listen(Noted(warning))
    return plan


def _shape(config: RunConfig) -> Any:
    """The model's sizes: from the catalog, else from its config.json here, else from the hub's."""
    name = str(config.model.name)
    known = None if os.path.isdir(name) else facts_by_name(name)
    if known is not None:
        return known
    check_name(name)
    return model_facts(locate(name, revision=config.model.revision, cache_dir=config.model.cache_dir).folder, name)
