"""The plan of a run that is not started: on this machine or another, with data or without, reckoned or probed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data.prepare import is_named
from llm_finetune_kit.errors import ConfigError, KitError, MachineError, ModelError
from llm_finetune_kit.events import Listen, Noted, Planned, ignore
from llm_finetune_kit.hardware import machine_named, this_machine
from llm_finetune_kit.material import prepare_run
from llm_finetune_kit.models.facts import facts_by_name, model_facts
from llm_finetune_kit.models.locate import check_name, locate
from llm_finetune_kit.plan import DataFacts, Plan, make_plan

ASSUMED = DataFacts(examples=1_000, held_out=50, tokens=200_000, target_tokens=100_000, longest=512)
MEAN = ASSUMED.tokens // ASSUMED.examples
OUT_OF_REACH = ((MachineError, 1), (ModelError, 3))  # the hub does not answer, or the model is gated


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

    Without data, or where the hub that has it is out of reach, nothing is read but the model's shape, which is known for the
    models of the catalog, and a usual set is assumed. Weights are fetched only to be `probed`, which runs some of its
    steps here and puts the plan on their ground. Raises what `prepare_run` raises, and ConfigError for a price below 0.
    """
    if price is not None and not price >= 0:
        raise ConfigError(4, f"a price of {price:g} dollars an hour", where="--price", fix="name a price of 0 or more")
    if on is not None and probed:
        raise ConfigError(14, "a probe runs here, so it tells nothing of another machine", fix="leave out --on or --probe")
    machine = machine_named(on) if on is not None else this_machine(Path(config.output.output_dir))
    if not is_named(config.data):
        if probed:
            raise ConfigError(14, "a probe needs data", where="data.train_file", fix="for example --data train.jsonl")
        return _assumed(config, machine, listen, "no data is named", price=price, force=force)
    try:
        material = prepare_run(config, ignore if probed else listen, machine=machine, price=price, force=force, weights=probed)
    except (MachineError, ModelError) as error:
        if probed or (type(error), error.number) not in OUT_OF_REACH or facts_by_name(str(config.model.name)) is None:
            raise
        return _assumed(config, machine, listen, _in_words(error), price=price, force=force)
    if not probed:
        return material.plan
    from llm_finetune_kit.probe import probe

    measured = probe(material)
    plan = make_plan(config, machine, material.model, material.facts, force=force, measured=measured, price=price)
    listen(Planned(plan.to_dict() | {"machine": machine.name}))
    told = f"{measured.steps} steps of {measured.step_tokens:,.0f} tokens on average took {measured.step_seconds:.2f} s each"
    listen(Noted(f"probed in {measured.seconds:.0f} s: {told}"))
    return plan


def _in_words(error: KitError) -> str:
    return f"{error.problem}, so its tokens cannot be counted"


def _assumed(config: RunConfig, machine: Any, listen: Listen, why: str, *, price: float | None, force: bool) -> Plan:
    """The plan for a usual set of data, and the reason for that."""
    if config.model.name is None:
        raise ConfigError(5, "no model is named", where="model.name", fix="for example --model mistral-7b")
    data = _usual(config)
    plan = make_plan(config, machine, _shape(config), data, force=force, price=price)
    listen(Planned(plan.to_dict() | {"machine": machine.name}))
    said = f"{data.examples:,} examples of {MEAN} tokens on average, half of them learned, the longest of {data.longest:,}"
    for warning in (f"{why}: reckoned with {said}", *plan.warnings):
        listen(Noted(warning))
    return plan


def _usual(config: RunConfig) -> DataFacts:
    """A usual set, of as many examples as the config allows."""
    examples = config.data.max_samples or ASSUMED.examples
    share = examples / ASSUMED.examples
    held_out = 0 if config.data.validation_split == 0 and config.data.eval_file is None else ASSUMED.held_out
    tokens, targets = round(share * ASSUMED.tokens), round(share * ASSUMED.target_tokens)
    return replace(ASSUMED, examples=examples, tokens=tokens, target_tokens=targets, held_out=held_out)


def _shape(config: RunConfig) -> Any:
    """The model's sizes: from the catalog, else from its config.json here, else from the hub's."""
    name = str(config.model.name)
    known = None if os.path.isdir(name) else facts_by_name(name)
    if known is not None:
        return known
    check_name(name)
    return model_facts(locate(name, revision=config.model.revision, cache_dir=config.model.cache_dir, weights=False).folder, name)
