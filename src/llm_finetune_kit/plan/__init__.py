"""The plan: every open question of a config answered, with a reason, from facts alone. Pure: no I/O, no torch.

Memory, time and cost are estimates; a run measures its peak and its speed and stores them beside them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from llm_finetune_kit.catalog import GUIDANCE
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import KitError, MachineError
from llm_finetune_kit.gpus import PRICE_SOURCE
from llm_finetune_kit.plan import contradictions, decisions, speed
from llm_finetune_kit.plan.decisions import RANK, Choice, Decisions
from llm_finetune_kit.plan.edits import edits
from llm_finetune_kit.plan.fitting import Asked, first_that_fits, needed_bytes
from llm_finetune_kit.plan.memory import BYTES, STATE, Work, moments
from llm_finetune_kit.plan.speed import Measured

LENGTH = 512  # of the rows that `fits` reckons with
NAME_ON_DISK = 130  # bytes of a token in tokenizer.json; Llama 3's has 17 MB for 128,256
WHEN = {
    "forward": "at the end of the forward pass",
    "backward": "in the backward pass",
    "saving": "while saving",
    "loading": "while loading",
}


@dataclass(frozen=True)
class DataFacts:
    """Counts of the data after masking; of streamed data all but `examples` are known from a sample."""

    examples: int
    held_out: int
    tokens: int
    target_tokens: int
    longest: int
    streamed: bool = False
    estimated: bool = False  # from characters, or a usual set: no token was counted


@dataclass(frozen=True)
class Plan:
    """A config without open questions, the reasons, and what the run will need."""

    config: RunConfig
    choices: tuple[Choice, ...]
    device: str
    steps: int
    warmup_steps: int
    examples_per_step: int
    trained_parameters: int
    memory: dict[str, int]  # bytes by part, at the moment when they are most
    moment: str
    needed_memory: int  # the peak without the pages of mapped files, which the system takes back when it must
    available_memory: int
    time: dict[str, Any]  # seconds by part; empty where the machine's speed is not known
    disk: dict[str, int]  # bytes by part
    cost: dict[str, Any] | None
    edits: tuple[str, ...]  # what makes it fit, each tried; empty where it does
    warnings: tuple[str, ...]

    @property
    def peak_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed_memory <= self.available_memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for plan.json and the Planned event."""
        tree = asdict(self) | {"peak_memory": self.peak_memory}
        tree["config"] = self.config.model_dump(mode="json")
        return tree


def make_plan(
    config: RunConfig,
    machine: Any,
    model: Any,
    data: DataFacts,
    *,
    force: bool = False,
    measured: Measured | None = None,
    price: float | None = None,
) -> Plan:
    """Decide what the config leaves open.

    `machine` is a `hardware.Machine`, `model` a `models.facts.ModelFacts`, `measured` what a probe found and `price`
    dollars an hour. Raises ConfigError for what the model cannot do, and MachineError where the run cannot fit into
    memory or on the disk; `force` makes a warning of that.

    >>> from llm_finetune_kit.hardware import machine_named
    >>> from llm_finetune_kit.models.facts import facts_by_name
    >>> data = DataFacts(examples=1000, held_out=100, tokens=200_000, target_tokens=100_000, longest=512)
    >>> plan = make_plan(RunConfig(), machine_named("T4"), facts_by_name("mistral-7b"), data)
    >>> plan.config.model.quantization
    'nf4'
    """
    plan = _checked_disk(_draft(config, machine, model, data, measured, price), machine.free_disk, force)
    if plan.fits:
        return plan
    longest = min(config.model.max_length or model.positions, data.longest)
    ways = edits(config, longest, narrow=machine.bfloat16, fits=lambda changed: _would_fit(changed, machine, model, data))
    needed, free = plan.needed_memory / 1e9, plan.available_memory / 1e9
    problem = f"needs about {needed:.1f} GB of memory and {free:.1f} GB are free on {machine.name}"
    if force:
        return replace(plan, edits=ways, warnings=(*plan.warnings, f"{problem}; you asked to start all the same"))
    parts = sorted(plan.memory.items(), key=lambda part: -part[1])
    why = f"most is needed {WHEN[plan.moment]}: " + ", ".join(f"{part} {size / 1e9:.1f} GB" for part, size in parts if size > 5e7)
    smaller = "no setting makes it fit: choose a larger machine or a smaller model (`finetune models --fits` lists what fits)"
    fix = "set " + ", or ".join(ways) if ways else smaller
    raise MachineError(20, problem, where=model.name, why=why, fix=fix)


def _checked_disk(plan: Plan, free: int, force: bool) -> Plan:
    """The plan, if what the run will write fits on the disk or is forced to. Raises MachineError."""
    needed = sum(plan.disk.values())
    if needed <= free:
        return plan
    problem = f"needs about {needed / 1e6:,.1f} MB of disk and {free / 1e6:,.1f} MB are free"
    if force:
        return replace(plan, warnings=(*plan.warnings, f"{problem}; you asked to start all the same"))
    why = ", ".join(f"{part} {size / 1e6:,.1f} MB" for part, size in plan.disk.items())
    fix = "free some, choose another disk with --output-dir, keep fewer checkpoints (training.save_total_limit=1), or add --force"
    raise MachineError(15, problem, where=plan.config.output.output_dir, why=why, fix=fix)


def fits(model: Any, machine: Any) -> str:
    """What fine-tuning of a model takes on a machine: `LoRA`, `with recompute`, `QLoRA`, or `no`.

    Reckoned for adapters of rank 16 on all linear layers and rows of 512 tokens, one to a pass.
    """
    dtype, _ = decisions.number_format(machine)
    targets = tuple(model.linear_names)
    trained = model.lora_parameters(RANK, list(targets))
    plain = Work("lora", dtype, LENGTH, LENGTH, machine.kind, RANK, targets, trained)
    for quantization, recompute, name in ((None, 0, "LoRA"), (None, 1, "with recompute"), ("nf4", 1, "QLoRA")):
        if needed_bytes(model, replace(plain, quantization=quantization, recompute=recompute)) <= machine.free_memory:
            return name
    return "no"


def compare(plan: dict[str, Any], peak_memory: int, tokens_per_second: float) -> dict[str, Any]:
    """Predicted against measured, for plan.json; an error of 0.1 means that a tenth too much was predicted."""
    pairs = {
        "peak_memory": (plan.get("peak_memory"), peak_memory),
        "tokens_per_second": ((plan.get("time") or {}).get("tokens_per_second"), tokens_per_second),
    }
    return {
        name: {"predicted": said, "measured": was, "error": said / was - 1 if said and was else None}
        for name, (said, was) in pairs.items()
    }


def _draft(
    config: RunConfig, machine: Any, model: Any, data: DataFacts, measured: Measured | None = None, price: float | None = None
) -> Plan:
    """The plan, whether it fits or not."""
    training, decide = config.training, Decisions()
    contradictions.refuse(config, model, data)
    contradictions.refuse_optimizer(training.optimizer, machine.kind)
    if data.streamed:
        decide("data.streaming", config.data.streaming, True, "the file is large, so rows are read as they are needed")
    dtype = decide("model.dtype", config.model.dtype, *decisions.number_format(machine))
    length = decide("model.max_length", config.model.max_length, *decisions.max_length(model, data))
    targets = decisions.adapter(config, model, decide) if config.method == "lora" else []
    r = decide.values.get("lora.r", 0)
    contradictions.refuse_rank(config, model, r, targets)
    trained = decisions.trained_parameters(config, model, r, targets)
    decide("training.learning_rate", training.learning_rate, *decisions.learning_rate(config.method, model.hidden))
    examples = training.batch_size * training.gradient_accumulation_steps
    steps, warmup = decisions.step_counts(config, data, examples)
    longest = min(length, data.longest)
    work = Work(config.method, dtype, longest, longest, machine.kind, r, tuple(targets), trained)
    work = replace(
        work,
        double_quantization=config.model.double_quantization,
        frozen_layers=training.freeze_layers,
        data_tokens=0 if data.streamed else data.tokens,
        variant=config.lora.variant,
        dropout=config.lora.dropout > 0,
        shapes=steps if data.tokens < data.examples * data.longest else 1,
    )
    work = _mechanics(config, machine, model, work, longest * min(examples, data.examples), decide)
    decisions.habits(config, machine, data, steps, decide)
    work = _compiled(config, machine, model, work, data, steps, decide)
    if training.liger is not None or machine.kind != "cpu":
        compiled = work.compiled and work.quantization is None
        decide("training.liger", training.liger, *decisions.fusing(model, machine, compiled))
    _answers(config, model, work, data, steps, decide)
    saves = -(-steps // int(decide.values["training.save_steps"]))
    moment, memory, needed = _memory(model, work, measured)
    disk = _disk(model, work, min(saves, max(2, training.save_total_limit)))
    time = _time(config, model, work, machine, data, steps, decide.values, measured)
    warnings = contradictions.unused(config, model, work.quantization, machine.kind)
    warnings += decisions.warnings(config, data, steps, warmup, examples)
    values = {"data.streaming": data.streamed, "output.run_name": config.output.run_name or decisions.run_name(config)}
    return Plan(
        config=config.with_values(decide.values | values),
        choices=tuple(decide.choices),
        device=machine.device,
        steps=steps,
        warmup_steps=warmup,
        examples_per_step=examples,
        trained_parameters=trained,
        memory=memory,
        moment=moment,
        needed_memory=needed,
        available_memory=machine.free_memory,
        time=time,
        disk=disk,
        cost=_cost(machine, time, price),
        edits=(),
        warnings=tuple(warnings),
    )


def _mechanics(config: RunConfig, machine: Any, model: Any, work: Work, step_tokens: int, decide: Decisions) -> Work:
    """How a step is computed: passes, recomputation, quantization and optimizer, which do not change what it means."""
    training, full = config.training, config.method == "full"
    best, why_best = decisions.best_tokens(machine, model)
    recommended = next(guide.recommended_gb for most, guide in GUIDANCE if model.parameters <= most) * 10**9
    crowded = machine.kind != "cpu" and machine.memory < recommended
    recompute = training.checkpoint_every if training.gradient_checkpointing is None else 0
    if training.gradient_checkpointing:
        recompute = training.checkpoint_every or 1
    asked = Asked(
        tokens=training.tokens_per_pass,
        best_tokens=best,
        longest=work.longest,
        step_tokens=step_tokens if training.packing else work.longest,
        recompute=recompute,
        quantization=None if full else config.model.quantization,
        may_quantize=not full and machine.kind != "mps" and config.lora.bias == "none",
        optimizer=training.optimizer,
    )
    budget, work = first_that_fits(asked, work, model, machine.free_memory)
    if crowded and work.quantization is None and work.recompute and asked.may_quantize and asked.quantization is None:
        packed, less = first_that_fits(replace(asked, quantization="nf4"), work, model, machine.free_memory)
        if (
            not less.recompute or recompute is not None
        ):  # the recommended memory is more than there is: 4 bits instead of recomputing
            budget, work = packed, less
    if not full:
        reason = "the weights would not fit otherwise" if work.quantization else f"the weights fit in {work.dtype}"
        if work.quantization and crowded:
            reason = f"{recommended // 10**9} GB are recommended for plain weights, and there are {machine.memory / 1e9:.0f}"
        decide("model.quantization", config.model.quantization, work.quantization, reason)
    decide("training.optimizer", training.optimizer, work.optimizer, _why_optimizer(work))
    lower = "more would not fit beside the rest" if budget < best else why_best
    decide("training.tokens_per_pass", training.tokens_per_pass, budget, lower)
    _tell_recompute(training, model, work, decide)
    decide.tell("attention", "per document", "packed examples do not see each other, and no pair across them is computed")
    return work


def _compiled(config: RunConfig, machine: Any, model: Any, work: Work, data: DataFacts, steps: int, decide: Decisions) -> Work:
    """The work with its blocks compiled, where that is asked for or pays on a GPU of known speed; elsewhere nothing is said."""
    asked = config.training.compile
    if asked is None and (machine.kind != "cuda" or machine.rates is None):
        return work
    rates = machine.rates or speed.USUAL[machine.kind]
    mean, share, tokens = _mean_step(data, _examples_of_a_step(config, data, steps), decide.values)

    def run(compiled: bool) -> float:
        return steps * speed.step_seconds(model, replace(work, compiled=compiled), rates, tokens, share * tokens, mean)

    liger = bool(config.training.liger)
    chosen = decide("training.compile", asked, *decisions.compiling(model, work.quantization, liger, run(False), run(True)))
    return replace(work, compiled=bool(chosen))


def _why_optimizer(work: Work) -> str:
    if work.optimizer == "adamw":
        return "its state is small beside the weights" if not work.full else "its full-precision state fits"
    return "its state in full precision would not fit"


def _tell_recompute(training: Any, model: Any, work: Work, decide: Decisions) -> None:
    every = work.recompute
    reason = "activations fit, and recomputing would cost a third more time"
    if training.checkpoint_every is not None:
        reason = "training.checkpoint_every asks for it"
    elif every:
        reason = "activations would not fit otherwise"
    decide("training.gradient_checkpointing", training.gradient_checkpointing, every > 0, reason)
    if every:
        share = "all blocks" if every == 1 else f"{-(-model.layers // every)} of {model.layers} blocks"
        why = f"{share} are computed again, the fewest that suffice"
        decide("training.checkpoint_every", training.checkpoint_every, every, why)


def _memory(model: Any, work: Work, measured: Measured | None) -> tuple[str, dict[str, int], int]:
    """The moment of the highest memory, its bytes by part, and what is needed; a probe's peak replaces the step's estimate."""
    found = moments(model, work)
    if measured is not None:
        step = max(("forward", "backward"), key=lambda name: sum(found[name].values()))
        found[step] |= {"measured beyond the estimate": measured.peak_memory - sum(found[step].values())}
        found = {name: parts for name, parts in found.items() if name not in {"forward", "backward"} - {step}}
    moment = max(found, key=lambda name: sum(found[name].values()))
    needed = max(sum(size for part, size in parts.items() if part != "files") for parts in found.values())
    return moment, {part: size for part, size in found[moment].items() if size}, needed


def _time(config: RunConfig, model: Any, work: Work, machine: Any, data: DataFacts, steps: int, knobs: Any, measured: Any) -> Any:
    """Seconds by part; `knobs` are decided values. A probe's means are moved from its steps to the run's mean step."""
    rates, seen = machine.rates, _examples_of_a_step(config, data, steps)
    if rates is None:
        return {}
    mean, share, tokens = _mean_step(data, seen, knobs)
    step = speed.step_seconds(model, work, rates, tokens, share * tokens, mean)
    held_out = speed.evaluation_seconds(model, work, rates, data.held_out * mean, mean)
    asked = len(config.evaluation.prompts or ()) or speed.SAMPLES
    answers = speed.answers_seconds(model, work, asked, config.evaluation.generation.max_new_tokens)
    start, source = speed.start_seconds(model, work), rates.source
    if measured is not None:
        length = measured.step_tokens / measured.step_examples
        reckoned = speed.step_seconds(model, work, rates, measured.step_tokens, measured.step_targets, length)
        step *= measured.step_seconds / reckoned
        held_out, answers, start = measured.evaluation, measured.answers, measured.start
        source = f"{measured.steps} steps measured on this machine"
    evaluations = (1 + -(-steps // int(knobs["training.eval_steps"]))) if data.held_out else 0
    saves = -(-steps // int(knobs["training.save_steps"]))
    answers *= 2 + (steps - 1) // int(knobs["evaluation.sample_steps"])
    parts = speed.run_seconds(
        work, step=step, steps=steps, evaluation=held_out, evaluations=evaluations, answers=answers, saves=saves, start=start
    )
    return parts | {"step_seconds": step, "tokens_per_second": tokens / step, "source": source}


def _mean_step(data: DataFacts, seen: float, knobs: Any) -> tuple[float, float, float]:
    """Of a step of `seen` examples: tokens of an example, the share of them that is learned, and tokens of all."""
    mean = min(data.tokens / max(1, data.examples), knobs["model.max_length"])
    return mean, data.target_tokens / max(1, data.tokens), seen * mean


def _answers(config: RunConfig, model: Any, work: Work, data: DataFacts, steps: int, decide: Decisions) -> None:
    """When the model answers during training, and how many prompts base and tuned answer at the end.

    Both follow from counts, not from how fast this machine is now: a run that is begun again tells the same answers.
    """
    mean, share, tokens = _mean_step(data, _examples_of_a_step(config, data, steps), decide.values)
    step = speed.step_seconds(model, work, speed.USUAL[work.device], tokens, share * tokens, mean)
    asked, evaluation = len(config.evaluation.prompts or ()) or speed.SAMPLES, config.evaluation
    answers = speed.answers_seconds(model, work, asked, evaluation.generation.max_new_tokens)
    every = int(decide.values["training.eval_steps"])
    decide("evaluation.sample_steps", evaluation.sample_steps, *decisions.sampling(answers / step, every, steps))
    if data.held_out and evaluation.compare:
        decide("evaluation.rows", evaluation.rows, *decisions.answered(answers / asked, steps * step, data.held_out))


def _examples_of_a_step(config: RunConfig, data: DataFacts, steps: int) -> float:
    """Mean over a run's steps: the last one of an epoch may be smaller."""
    examples = min(config.training.batch_size * config.training.gradient_accumulation_steps, data.examples)
    epochs, more = divmod(steps, -(-data.examples // max(1, examples)))
    return (epochs * data.examples + more * examples) / max(1, steps)


def _disk(model: Any, work: Work, checkpoints: int) -> dict[str, int]:
    """Bytes of the run folder at its fullest: the checkpoints kept, one more being written, and the final model."""
    names = NAME_ON_DISK * model.vocabulary
    final = BYTES.get(model.stored_dtype, 4) * model.parameters if work.full else 4 * work.trained
    weights = 4 * model.parameters if work.full else 4 * work.trained
    one = weights + round(STATE[work.optimizer] * work.trained) + names
    return {"checkpoints": checkpoints * one, "one being written": one, "final": final + names}


def _cost(machine: Any, time: dict[str, Any], price: float | None) -> dict[str, Any] | None:
    hourly, source = (price, "your price") if price is not None else (machine.price, PRICE_SOURCE)
    if hourly is None or not time:
        return None
    hours = time["total"] / 3600
    return {"hours": hours, "price_per_hour": hourly, "total": hours * hourly, "source": source}


def _would_fit(config: RunConfig, machine: Any, model: Any, data: DataFacts) -> bool:
    try:
        return _draft(config, machine, model, data).fits
    except KitError:
        return False
