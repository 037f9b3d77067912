"""What a run works with: everything that happens before weights are loaded, cheap failures first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.data import prepare, streaming
from llm_finetune_kit.data.gate import gate
from llm_finetune_kit.data.mixing import mixed
from llm_finetune_kit.data.split import split
from llm_finetune_kit.data.windows import windowed
from llm_finetune_kit.errors import ConfigError
from llm_finetune_kit.events import Listen, Noted, Planned, Stage, Warned, ignore
from llm_finetune_kit.hardware import main_memory, share_the_machine, this_machine
from llm_finetune_kit.models.locate import check_name, locate, read_ahead
from llm_finetune_kit.models.quantization import require_bitsandbytes
from llm_finetune_kit.models.safety import check_vocabulary
from llm_finetune_kit.plan import DataFacts, Plan, make_plan

WINDOW = 1024  # tokens of a piece of a long raw text, where the model can read that much
XRAYED = 3  # examples whose tokens are kept for the report
LONGEST_XRAY = 2000  # tokens of the longest that is kept


@dataclass(frozen=True)
class Material:
    """What a run works with: data as tokens, the tokenizer, where the model is, and all that was learned about them.

    `train` is a `masks.Tokens` or, for data larger than memory, a `streaming.Stream`. `shown` are examples to
    look at and to ask the model: held-out ones if there are any.
    """

    chat: Any
    located: Any
    train: Any
    held_out: Any
    shown: Any
    report: dict[str, Any]
    plan: Plan
    warnings: list[str]
    model: Any  # models.facts.ModelFacts
    facts: DataFacts
    place: Callable[[int], str]  # of a training row: its file and line
    held_out_place: Callable[[int], str]  # names a held-out row as a person finds it


@dataclass
class _Sets:
    """Training and held-out examples before they are cut, and what is known about them."""

    train: Any
    held_out: Any
    sample: Any  # of the training examples: all of them, unless they are streamed
    origin: str
    report: dict[str, Any]
    train_place: Callable[[int], str]
    held_out_place: Callable[[int], str]
    warnings: list[str] = field(default_factory=list)


def prepare_run(
    config: RunConfig,
    listen: Listen = ignore,
    *,
    machine: Any = None,
    price: float | None = None,
    force: bool = False,
    weights: bool = True,
) -> Material:
    """All that happens before the weights are loaded: data, tokenizer, masks, gate, facts and plan.

    Cheap failures first: names and files are checked before torch is imported. `machine` is planned for instead of
    this one, `price` is in dollars an hour, and with `force` a run that seems not to fit is planned all the same. Without
    `weights` those of a model on the hub are not fetched.
    """
    share_the_machine()
    if config.model.name is None:
        raise ConfigError(
            5, "no model is named", where="model.name", fix="for example --model demo, --model gpt2 or a local folder"
        )
    named = prepare.training_sets(config.data)
    check_name(config.model.name)
    apart = prepare.held_out_set(config.data)
    read = _read(config, named, apart, listen)

    located, chat, model = _model(config, weights)
    sets = (_streamed if isinstance(read, _Streamed) else _in_memory)(config, read, chat, model.positions)
    longest = int(max(tokens.lengths.max() for tokens in (sets.sample, sets.held_out) if tokens is not None))
    length = config.model.max_length or min(longest, model.positions)
    sample, held_out, masks, warnings = _gated(config, chat, sets, length, model.positions)
    listen(Stage("plan", str(config.model.name)))
    facts = _data_facts(sets, sample, held_out, longest)
    machine = machine or this_machine(Path(config.output.output_dir))
    plan = make_plan(config, machine, model, facts, price=price, force=force)
    decided = int(plan.config.model.max_length or length)
    train = sample
    if isinstance(sets.train, streaming.Stream):
        train, sets.train.max_length = sets.train, decided
    chat.thinking = masks.thinking  # asked later as it was trained
    learned = {"masks": _mask_report(masks, held_out, sets.origin, longest, chat), "xray": _xray(sets, chat, decided)}
    warnings = [*_idle(config, located), *sets.warnings, *warnings, *plan.warnings]
    _tell(listen, plan, machine, _notes(sets, train, held_out), warnings)
    shown = sample if held_out is None else held_out
    report = sets.report | learned
    return Material(
        chat, located, train, held_out, shown, report, plan, warnings, model, facts, sets.train_place, sets.held_out_place
    )


def _model(config: RunConfig, weights: bool) -> tuple[Any, Any, Any]:
    """Where the model is, its tokenizer and its sizes."""
    wanted = config.model
    if weights and wanted.quantization is not None and config.method == "lora":
        require_bitsandbytes()
    located = locate(
        str(wanted.name),
        revision=wanted.revision,
        cache_dir=wanted.cache_dir,
        weights=weights or Path(str(wanted.name)).is_dir(),
        trust_remote_code=wanted.trust_remote_code,
    )
    if weights:
        read_ahead(located.folder, main_memory()[1])
    from llm_finetune_kit.models.tokenizer import load_tokenizer

    chat = load_tokenizer(located.folder, config.data.template, trusted=located.trusted)
    from llm_finetune_kit.models.facts import model_facts

    model = model_facts(located.folder, str(wanted.name), trusted=located.trusted)
    if config.method == "lora" and config.lora.modules_to_save:
        from llm_finetune_kit.models.adapters import check_whole_modules

        check_whole_modules(located.folder, config.lora.modules_to_save, trusted=located.trusted)
    else:  # the embeddings cannot grow with the tokenizer
        check_vocabulary(chat, model.vocabulary)
    return located, chat, model


def _idle(config: RunConfig, located: Any) -> list[str]:
    """Settings of the hub, where the model does not come from there."""
    given = [f"model.{name}" for name in ("revision", "cache_dir") if getattr(config.model, name) is not None]
    return [f"{' and '.join(given)} will not be used: {located.name} is no model of the hub"] if given and located.local else []


def _tell(listen: Listen, plan: Plan, machine: Any, notes: list[str], warnings: list[str]) -> None:
    listen(Planned(plan.to_dict() | {"machine": machine.name}))
    for note in notes:
        listen(Noted(note))
    for warning in warnings:
        listen(Warned(warning))


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Streamed:
    path: str
    survey: streaming.Survey
    held_out: prepare.Read | None


@dataclass(frozen=True)
class _Whole:
    parts: list[prepare.Read]
    shares: list[float]
    held_out: prepare.Read | None


def _read(config: RunConfig, named: Any, apart: Any, listen: Listen) -> _Streamed | _Whole:
    """Every row of every set, understood or refused. Needs neither torch nor a tokenizer."""
    settings, seed = config.data, config.training.seed
    first = next(iter(named))
    stream = settings.streaming if settings.streaming is not None else streaming.is_large(first)
    for spec in named:
        listen(Stage("data", _data_name(spec)))
    held_out = prepare.read(apart, settings, seed) if apart is not None else None
    if stream:
        if len(named) > 1 or not isinstance(first, str) or not Path(first).is_file():
            fix = "name one JSON lines or Parquet file in data.train_file, or leave data.streaming out"
            raise ConfigError(13, f"{_data_name(first)} cannot be streamed: it is not one local file", fix=fix)
        hold_out = held_out is None and settings.validation_split != 0
        return _Streamed(first, streaming.survey(first, settings, seed, hold_out=hold_out), held_out)
    shares = list(named.values()) if isinstance(named, dict) else [1.0] * len(named)
    return _Whole([prepare.read(spec, settings, seed) for spec in named], shares, held_out)


def _whole(data: prepare.Encoded, config: RunConfig, chat: Any, limit: int) -> prepare.Encoded:
    """Raw texts in windows that the model can read; anything else as it is."""
    length = config.model.max_length or min(limit, WINDOW)
    return windowed(data, length, chat) if data.report["format"] == "text" else data


def _in_memory(config: RunConfig, read: Any, chat: Any, limit: int) -> _Sets:
    settings, seed, known = config.data, config.training.seed, chat.fingerprint()
    parts = [_whole(prepare.tokenize(part, settings, chat, known, seed), config, chat, limit) for part in read.parts]
    data = parts[0] if len(parts) == 1 else mixed(parts, read.shares, seed)
    apart = None
    if read.held_out is not None:
        apart = _whole(prepare.tokenize(read.held_out, settings, chat, known, seed), config, chat, limit)
    sides = split(data, settings, seed, held_out=apart)
    report = {"train": data.report | {"near_copies": sides.near_copies}} | ({"held_out": apart.report} if apart else {})
    warnings = [*(warning for part in report.values() for warning in part["warnings"]), *sides.warnings]
    warnings += prepare.repeats(data.report, sides.train, settings.max_samples)
    warnings += apart.report.get("repeats", []) if apart else []
    place = apart.place if apart else data.place
    return _Sets(sides.train, sides.held_out, sides.train, sides.origin, report, data.place, place, warnings)


def _streamed(config: RunConfig, read: Any, chat: Any, limit: int) -> _Sets:
    settings, seed = config.data, config.training.seed
    train = streaming.Stream(read.path, read.survey, settings, chat)
    report = {"train": streaming.report(read.path, read.survey)}
    sample = train.sample()
    held_out: Any = sample
    place: Callable[[int], str] = train.place
    origin = f"{len(sample):,} of {sum(read.survey.usable):,} examples, chosen by the seed"
    if read.held_out is not None:
        apart = prepare.tokenize(read.held_out, settings, chat, chat.fingerprint(), seed)
        held_out, origin, place = apart.tokens, str(apart.report["name"]), apart.place
        report["held_out"] = apart.report
    elif settings.validation_split == 0:
        held_out, origin = None, "none: data.validation_split is 0"
    warnings = [warning for part in report.values() for warning in part["warnings"]]
    return _Sets(train, held_out, sample, origin, report, train.place, place, warnings)


# --- the gate and the plan ---------------------------------------------------------------------------------


def _gated(config: RunConfig, chat: Any, sets: _Sets, length: int, limit: int | None) -> tuple[Any, Any, Any, list[str]]:
    """Both sets cut to `length` and let through the gate, facts about the training masks, and warnings."""
    formats = {name for part in sets.report.values() for name in str(part["format"]).split(" + ")}
    how = {"texts": bool({"text", "tokens"} & formats), "own_masks": formats == {"tokens"}}
    name, place = str(sets.report["train"]["name"]), sets.train_place
    whole = not isinstance(sets.train, streaming.Stream)
    train, masks, warnings = gate(
        sets.sample, chat, config.data, name, length, place=place, limit=limit, may_leave_out=whole, **how
    )
    held_out = sets.held_out
    if held_out is sets.sample:  # streamed: the sample stands for both
        return train, train, masks, [f"in a sample of {len(train):,} examples: {warning}" for warning in warnings]
    if held_out is not None:
        place = sets.held_out_place
        held_out, _, more = gate(held_out, chat, config.data, "held-out rows", length, place=place, limit=limit, **how)
        warnings += [f"held out: {warning}" for warning in more]
    return train, held_out, masks, warnings


def _data_facts(sets: _Sets, sample: Any, held_out: Any, longest: int) -> DataFacts:
    streamed = isinstance(sets.train, streaming.Stream)
    scale = len(sets.train) / len(sample) if streamed else 1.0  # of a streamed set only a sample is known
    return DataFacts(
        examples=len(sets.train) if streamed else len(sample),
        held_out=len(held_out) if held_out is not None else 0,
        tokens=round(scale * len(sample.ids)),
        target_tokens=round(scale * int(sample.targets.sum())),
        longest=longest,
        streamed=streamed,
    )


def _mask_report(masks: Any, held_out: Any, origin: str, longest: int, chat: Any) -> dict[str, Any]:
    return {
        "examples": masks.examples,
        "tokens": masks.tokens,
        "target_tokens": masks.target_tokens,
        "held_out_examples": len(held_out) if held_out is not None else 0,
        "held_out_from": origin,
        "longest": longest,
        "template": chat.source,
    }


def _notes(sets: _Sets, train: Any, held_out: Any) -> list[str]:
    """What the reader should know of the data: formats and how they were told, sizes, what was done."""
    parts = [part for whole in sets.report.values() for part in whole.get("parts", [whole])]
    told = [f"{part['name']} is read as {part['format']}: {part['why_format']}" for part in parts]
    told += [note for part in sets.report.values() for note in part["notes"]]
    apart = f", {len(held_out):,} held out ({sets.origin})" if held_out is not None else f", held out: {sets.origin}"
    return [*told, f"{len(train):,} examples are trained on{apart}"]


def _xray(sets: _Sets, chat: Any, length: int) -> dict[str, Any]:
    """A few training examples token by token as they are computed, for the report, and counts over all of them."""
    from llm_finetune_kit.data.xray import totals, xray

    short = [index for index, count in enumerate(sets.sample.lengths[:1000]) if count <= LONGEST_XRAY]
    examples = xray(sets.sample, length, chat, short[:XRAYED])
    shown = [
        {
            "place": sets.train_place(example.row),
            "row": example.row,
            "tokens": [[token.id, token.text, token.state] for token in example.tokens],
        }
        for example in examples
    ]
    return {"totals": asdict(totals(sets.sample, length)), "examples": shown}


def _data_name(data: Any) -> str:
    return data if isinstance(data, str) else f"{len(data)} rows" if isinstance(data, list) else type(data).__name__
