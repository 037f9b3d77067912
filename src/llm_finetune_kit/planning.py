"""The plan of a run that is not started: on this machine or another, with data or without, reckoned or probed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data import prepare, streaming
from llm_finetune_kit.data.mixing import counts_of
from llm_finetune_kit.data.similar import answers_of, text_of
from llm_finetune_kit.data.split import apart_of
from llm_finetune_kit.errors import ConfigError, KitError, MachineError, ModelError
from llm_finetune_kit.events import Listen, Noted, Planned, ignore
from llm_finetune_kit.hardware import machine_named, this_machine
from llm_finetune_kit.material import WINDOW, prepare_run
from llm_finetune_kit.models.facts import facts_by_name, model_facts
from llm_finetune_kit.models.locate import check_name, locate
from llm_finetune_kit.plan import DataFacts, Plan, make_plan

ASSUMED = DataFacts(examples=1_000, held_out=50, tokens=200_000, target_tokens=100_000, longest=512, estimated=True)
LETTERS = 4  # characters of a token: about what English text has in common tokenizers
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
    models of the catalog, and a usual set is assumed. Where only the tokenizer is out of reach, the rows are counted and
    their tokens estimated from their characters. Weights are fetched only to be `probed`, which runs some of its
    steps here and puts the plan on their ground. Raises what `prepare_run` raises, and ConfigError for a price below 0.
    """
    if price is not None and not price >= 0:
        raise ConfigError(4, f"a price of {price:g} dollars an hour", where="--price", fix="name a price of 0 or more")
    if on is not None and probed:
        raise ConfigError(14, "a probe runs here, so it tells nothing of another machine", fix="leave out --on or --probe")
    machine = machine_named(on) if on is not None else this_machine(Path(config.output.output_dir))
    if not prepare.is_named(config.data):
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


def _in_figures(data: DataFacts) -> str:
    mean, share = data.tokens / data.examples, data.target_tokens / data.tokens
    told = f"{data.examples:,} examples of {mean:,.0f} tokens on average"
    return f"{told}, {share:.0%} of them learned, the longest of {data.longest:,}"


def _assumed(config: RunConfig, machine: Any, listen: Listen, why: str, *, price: float | None, force: bool) -> Plan:
    """The plan for data whose tokens were not counted: for estimated ones, else for a usual set; and the reason for that."""
    if config.model.name is None:
        raise ConfigError(5, "no model is named", where="model.name", fix="for example --model mistral-7b")
    model = _shape(config)
    length = config.model.max_length or model.positions
    known = _estimated(config, length) if prepare.is_named(config.data) else None
    data = _usual(config, length) if known is None else known
    plan = make_plan(config, machine, model, data, force=force, price=price)
    listen(Planned(plan.to_dict() | {"machine": machine.name}))
    said = _in_figures(data)
    if known is not None:
        ground = f"about {LETTERS} a token, without what the chat template adds"
        said = f"the data's {said}; lengths are estimated from characters, {ground}"
    for warning in (f"{why}: reckoned with {said}", *plan.warnings):
        listen(Noted(warning))
    return plan


def _usual(config: RunConfig, length: int) -> DataFacts:
    """A usual set, of as many examples as the config allows, none longer than `length` tokens on average."""
    examples = config.data.max_samples or ASSUMED.examples
    held_out = 0 if config.data.validation_split == 0 and config.data.eval_file is None else ASSUMED.held_out
    mean = min(ASSUMED.tokens // ASSUMED.examples, length)
    return replace(ASSUMED, examples=examples, tokens=examples * mean, target_tokens=examples * mean // 2, held_out=held_out)


@dataclass(frozen=True)
class _Lengths:
    """Estimated tokens of the examples of a set, int64 [examples]: all of them, and those that are learned."""

    tokens: np.ndarray
    targets: np.ndarray

    def cut(self, length: int) -> _Lengths:
        """What is left of examples that are cut at the end, where answers stand."""
        tokens = np.minimum(self.tokens, length)
        return _Lengths(tokens, np.maximum(0, self.targets - (self.tokens - tokens)))


def _estimated(config: RunConfig, length: int) -> DataFacts | None:
    """Counts of the data as a run would cut it to `length`; None where the hub that has it is out of reach."""
    first = next(iter(prepare.training_sets(config.data)))
    stream = config.data.streaming if config.data.streaming is not None else streaming.is_large(first)
    try:
        parts, counts, held_out = _sampled(first, config, length) if stream else _read_whole(config, length)
    except MachineError as error:
        if error.number != 1:
            raise
        return None
    cut = [part.cut(length) for part in parts]
    return DataFacts(
        examples=round(sum(counts)),
        held_out=held_out,
        tokens=round(sum(part.tokens.mean() * count for part, count in zip(cut, counts, strict=True))),
        target_tokens=round(sum(part.targets.mean() * count for part, count in zip(cut, counts, strict=True))),
        longest=int(max(part.tokens.max() for part in parts)),
        streamed=stream,
        estimated=True,
    )


def _read_whole(config: RunConfig, length: int) -> tuple[list[_Lengths], list[float], int]:
    """Every set, how many examples of each are trained on, and how many are held out."""
    settings, named = config.data, prepare.training_sets(config.data)
    parts = [_lengths(spec, config, length) for spec in named]
    shares = list(named.values()) if isinstance(named, dict) else [1.0] * len(named)
    counts = counts_of([len(part.tokens) for part in parts], shares)
    total = sum(counts)
    examples = min(total, settings.max_samples or total)
    apart = prepare.held_out_set(settings)
    if apart is not None:
        return parts, [count * examples / total for count in counts], len(_lengths(apart, config, length).tokens)
    held_out = min(round(apart_of(examples, settings.validation_split)), examples - 1)
    return parts, [count * (examples - held_out) / total for count in counts], held_out


def _sampled(path: str, config: RunConfig, length: int) -> tuple[list[_Lengths], list[float], int]:
    """The same of a streamed file, whose sampled rows stand for all."""
    settings, apart = config.data, prepare.held_out_set(config.data)
    hold_out = apart is None and settings.validation_split != 0
    found = streaming.survey(path, settings, config.training.seed, hold_out=hold_out)
    sample = [row for _, row in found.sample]
    held_out = len(_lengths(apart, config, length).tokens) if apart is not None else len(sample) if hold_out else 0
    return [_lengths(sample, config, length)], [float(found.counts.sum())], held_out


def _lengths(spec: Any, config: RunConfig, length: int) -> _Lengths:
    """The estimated lengths of a set's examples, uncut; raw texts in windows that the model can read."""
    read = prepare.understood(spec, config.data, config.training.seed)
    if read.formatted is None:  # tokenized already, and counted
        assert read.ready is not None
        return _Lengths(read.ready.lengths, read.ready.targets)
    examples = read.formatted.examples
    tokens = np.array([_tokens(text_of(example)) for example in examples], dtype=np.int64)
    if read.report["format"] == "text":
        pieces = -(-tokens // (config.model.max_length or min(length, WINDOW)))
        tokens = np.repeat(-(-tokens // pieces), pieces)
    if read.report["format"] == "text" or config.data.loss_on != "answers":
        return _Lengths(tokens, tokens)
    return _Lengths(tokens, np.array([_tokens(answers_of(example)) for example in examples], dtype=np.int64))


def _tokens(text: str) -> int:
    return max(1, -(-len(text) // LETTERS))


def _shape(config: RunConfig) -> Any:
    """The model's sizes: from the catalog, else from its config.json here, else from the hub's."""
    name = str(config.model.name)
    known = None if os.path.isdir(name) else facts_by_name(name)
    if known is not None:
        return known
    check_name(name)
    return model_facts(locate(name, revision=config.model.revision, cache_dir=config.model.cache_dir, weights=False).folder, name)
