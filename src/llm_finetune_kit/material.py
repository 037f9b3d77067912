"""What a run works with: everything that happens before weights are loaded, cheap failures first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data import prepare
from llm_finetune_kit.data.gate import gate
from llm_finetune_kit.errors import ConfigError
from llm_finetune_kit.events import Listen, Planned, Stage, Warned, ignore
from llm_finetune_kit.models.locate import check_name, locate
from llm_finetune_kit.plan import DataFacts, Plan, make_plan


@dataclass(frozen=True)
class Material:
    """What a run works with: data as tokens, the tokenizer, where the model is, and all that was learned about them."""

    chat: Any
    located: Any
    train: Any
    held_out: Any
    report: dict[str, Any]
    plan: Plan
    warnings: list[str]


def prepare_run(config: RunConfig, listen: Listen = ignore) -> Material:
    """All that happens before the weights are loaded: data, tokenizer, masks, gate, facts and plan.

    Cheap failures first: names and files are checked before torch is imported.
    """
    if config.model.name is None:
        raise ConfigError(
            5, "no model is named", where="model.name", fix="for example --model demo, --model gpt2 or a local folder"
        )
    if config.data.train_file is None:
        raise ConfigError(
            5, "no training data is named", where="data.train_file", fix="for example --data sample:chat or --data train.jsonl"
        )
    check_name(config.model.name)
    listen(Stage("data", _data_name(config.data.train_file)))
    read = {"train": prepare.read(config.data.train_file, config.data)}
    if config.data.eval_file is not None:
        read["held_out"] = prepare.read(config.data.eval_file, config.data)

    located = locate(config.model.name, revision=config.model.revision, cache_dir=config.model.cache_dir)
    from llm_finetune_kit.models.tokenizer import load_tokenizer

    chat = load_tokenizer(located.folder)
    encoded = {name: prepare.tokenize(data, config.data, chat, chat.fingerprint()) for name, data in read.items()}
    seed = config.training.seed
    train, held_out, origin = prepare.split(encoded["train"].tokens, config.data, seed, apart="held_out" in encoded)
    if "held_out" in encoded:
        held_out, origin = encoded["held_out"].tokens, str(config.data.eval_file)

    longest = int(max(tokens.lengths.max() for tokens in (train, held_out) if tokens is not None))
    length = config.model.max_length or longest
    train, held_out, masks, warnings = _gated(config, chat, train, held_out, length)

    listen(Stage("plan", str(config.model.name)))
    plan, machine = _decided(config, located, train, held_out, longest)
    if int(plan.config.model.max_length or length) < length:  # the model's own limit
        train, held_out, masks, warnings = _gated(config, chat, train, held_out, int(plan.config.model.max_length or length))
    report = {name: data.report for name, data in encoded.items()}
    report["masks"] = {
        "examples": masks.examples,
        "tokens": masks.tokens,
        "target_tokens": masks.target_tokens,
        "held_out_examples": len(held_out) if held_out is not None else 0,
        "held_out_from": origin,
        "longest": longest,
        "template": chat.source,
    }
    warnings = [*(warning for data in encoded.values() for warning in data.report["warnings"]), *warnings, *plan.warnings]
    listen(Planned(plan.to_dict() | {"machine": machine}))
    for warning in warnings:
        listen(Warned(warning))
    return Material(chat, located, train, held_out, report, plan, warnings)


def _gated(config: RunConfig, chat: Any, train: Any, held_out: Any, length: int) -> tuple[Any, Any, Any, list[str]]:
    """Both sets cut to `length` and let through the gate, facts about the training masks, and warnings."""
    train, masks, warnings = gate(train, chat, config.data, _data_name(config.data.train_file), length)
    if held_out is not None:
        held_out, _, more = gate(held_out, chat, config.data, "held-out rows", length)
        warnings += [f"held out: {warning}" for warning in more]
    return train, held_out, masks, warnings


def _decided(config: RunConfig, located: Any, train: Any, held_out: Any, longest: int) -> tuple[Plan, str]:
    """The plan for this machine, and the machine's name. The first that needs torch."""
    from llm_finetune_kit.hardware import this_machine
    from llm_finetune_kit.models.facts import model_facts

    facts = DataFacts(
        examples=len(train),
        held_out=len(held_out) if held_out is not None else 0,
        tokens=len(train.ids),
        target_tokens=int(train.targets.sum()),
        longest=longest,
    )
    machine = this_machine(Path(config.output.output_dir))
    return make_plan(config, machine, model_facts(located.folder, str(config.model.name)), facts), machine.name


def _data_name(data: Any) -> str:
    return data if isinstance(data, str) else f"{len(data)} rows"
