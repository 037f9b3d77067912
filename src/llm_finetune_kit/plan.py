"""The plan: every open question of a config answered, with a reason, from facts alone. Pure: no I/O, no torch.

Memory figures are estimates; a run measures its peak and stores it beside them.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import ConfigError, MachineError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LIBRARIES = 650_000_000  # torch, transformers and peft in memory, measured on Linux
CPU_BLOCK = 30_000_000  # bytes of one activation above which a CPU's allocator page-faults every time
LOGITS = 4 * 30_000_000  # the loss head's workspace, see training/step.py


@dataclass(frozen=True)
class DataFacts:
    """Counts of the data after masking; of streamed data all but `examples` are known from a sample."""

    examples: int
    held_out: int
    tokens: int
    target_tokens: int
    longest: int
    streamed: bool = False


@dataclass(frozen=True)
class Choice:
    """One decision: the knob, its value and why."""

    knob: str
    value: Any
    reason: str


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
    memory: dict[str, int]  # bytes by part
    available_memory: int
    warnings: tuple[str, ...]

    @property
    def peak_memory(self) -> int:
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for plan.json and the Planned event."""
        tree = asdict(self) | {"peak_memory": self.peak_memory}
        tree["config"] = self.config.model_dump(mode="json")
        return tree


def make_plan(config: RunConfig, machine: Any, model: Any, data: DataFacts) -> Plan:
    """Decide what the config leaves open.

    `machine` is a `hardware.Machine`, `model` a `models.facts.ModelFacts`. Raises ConfigError for unknown
    target modules and MachineError where the run cannot fit into memory.
    """
    choices: list[Choice] = []

    def decide(knob: str, asked: Any, value: Any, reason: str) -> Any:
        choice = Choice(knob, value, reason) if asked is None else Choice(knob, asked, "you asked for it")
        choices.append(choice)
        return choice.value

    training = config.training
    if data.streamed:
        decide("data.streaming", config.data.streaming, True, "the file is large, so rows are read as they are needed")
    dtype = decide("model.dtype", config.model.dtype, *_dtype(machine))
    length = _max_length(config, model, data)
    max_length = decide("model.max_length", config.model.max_length, *length)
    adapter = _adapter(config, model, decide) if config.method == "lora" else {}
    trained = model.lora_parameters(adapter["lora.r"], adapter["lora.target_modules"]) if adapter else model.parameters
    rate = decide("training.learning_rate", training.learning_rate, *_learning_rate(config.method, model.hidden))
    examples = training.batch_size * training.gradient_accumulation_steps
    steps, warmup = _steps(config, data, examples)
    fixed = _fixed_memory(config.method, dtype, model, trained)
    left = machine.free_memory - sum(fixed.values())
    per_token = activation_bytes(model, dtype, recompute=False)
    longest = min(max_length, data.longest)
    tokens = decide("training.tokens_per_pass", training.tokens_per_pass, *_tokens(machine, model, per_token, left, longest))
    widest = max(tokens, longest)
    tight = per_token * widest > 0.8 * left
    recompute = decide(
        "training.gradient_checkpointing",
        training.gradient_checkpointing,
        tight,
        "activations would not fit otherwise" if tight else "activations fit, and recomputing would cost a third more time",
    )
    tenth = max(1, steps // 10)
    eval_steps = decide("training.eval_steps", training.eval_steps, tenth, "ten evaluations in a run")
    save_steps = decide("training.save_steps", training.save_steps, tenth, "at most a tenth of the run can be lost")
    patience = training.early_stopping_patience
    if data.held_out:
        patience = decide(
            "training.early_stopping_patience", patience, 3, "three evaluations without improvement are no accident"
        )
    decided = adapter | {
        "data.streaming": data.streamed,
        "model.dtype": dtype,
        "model.max_length": max_length,
        "training.learning_rate": rate,
        "training.tokens_per_pass": tokens,
        "training.gradient_checkpointing": recompute,
        "training.eval_steps": eval_steps,
        "training.save_steps": save_steps,
        "training.early_stopping_patience": patience,
        "output.run_name": config.output.run_name or _run_name(config),
    }
    memory = fixed | {"activations": activation_bytes(model, dtype, recompute=recompute) * widest}
    plan = Plan(
        config=config.with_values(decided),
        choices=tuple(choices),
        device=machine.device,
        steps=steps,
        warmup_steps=warmup,
        examples_per_step=examples,
        trained_parameters=trained,
        memory=memory,
        available_memory=machine.free_memory,
        warnings=tuple(_warnings(config, data, steps, warmup, examples)),
    )
    _must_fit(plan, model, dtype)
    return plan


def _dtype(machine: Any) -> tuple[str, str]:
    if machine.bfloat16:
        return "bfloat16", machine.why_bfloat16
    return "float32", f"{machine.why_bfloat16}, and float16 needs loss scaling"


def _max_length(config: RunConfig, model: Any, data: DataFacts) -> tuple[int, str]:
    if data.streamed and 2 * data.longest < model.positions:
        return 2 * data.longest, "twice the longest of the sampled examples, as the others are not known yet"
    if data.longest <= model.positions:
        return data.longest, "the longest example; nothing is cut, and short ones cost nothing extra"
    return model.positions, f"the model's limit; the longest example has {data.longest:,} tokens"


def _adapter(config: RunConfig, model: Any, decide: Any) -> dict[str, Any]:
    r = decide("lora.r", config.lora.r, 16, "enough for instruction data")
    alpha = decide("lora.alpha", config.lora.alpha, 2 * r, "twice r")
    asked = config.lora.target_modules
    targets = model.linear_names if asked in (None, "all-linear") else list(asked)
    unknown = [name for name in targets if name not in model.linear_names]
    if unknown:
        raise ConfigError(
            10,
            f"{model.architecture} has no layer {', '.join(unknown)}",
            where="lora.target_modules",
            fix=f"choose from {', '.join(model.linear_names)}, or all-linear",
        )
    decide(
        "lora.target_modules",
        None if asked == "all-linear" else asked,
        targets,
        "all linear layers: adapters on attention alone learn less",
    )
    return {"lora.r": r, "lora.alpha": alpha, "lora.target_modules": targets}


def _learning_rate(method: str, hidden: int) -> tuple[float, str]:
    """2e-4 (LoRA) and 2e-5 (full) are the field's defaults at width 4096; narrower models want more."""
    base = 2e-4 if method == "lora" else 2e-5
    rate = float(f"{base * math.sqrt(4096 / hidden):.1e}")
    return rate, f"{base:g} for a model 4096 wide, times sqrt(4096 / {hidden})"


def _steps(config: RunConfig, data: DataFacts, examples: int) -> tuple[int, int]:
    training = config.training
    per_epoch = -(-data.examples // examples)
    steps = training.max_steps or max(1, math.ceil(training.num_epochs * per_epoch))
    warmup = training.warmup_steps if training.warmup_steps is not None else math.ceil(training.warmup_ratio * steps)
    return steps, warmup


def _fixed_memory(method: str, dtype: str, model: Any, trained: int) -> dict[str, int]:
    weights = model.parameters * BYTES[dtype] + trained * 4 if method == "lora" else model.parameters * 4
    return {
        "weights": weights,
        "gradients": trained * 4,
        "optimizer": trained * 8,
        "loss head": LOGITS,
        "libraries": LIBRARIES,
    }


def activation_bytes(model: Any, dtype: str, *, recompute: bool) -> int:
    """Bytes kept for the backward pass per token: inputs and outputs of every linear layer, attention in
    float32, two norms and residuals per layer; with recompute only each layer's input and one live layer."""
    size = BYTES[dtype]
    linear: int = sum(inputs + outputs for _, inputs, outputs in model.linear_shapes) * size
    rest: int = model.layers * (4 * model.heads * model.head_dim * 4 + 6 * model.hidden * 4)
    if recompute:
        inputs: int = model.layers * model.hidden * 4
        return inputs + (linear + rest) // max(1, int(model.layers))
    return linear + rest


def _tokens(machine: Any, model: Any, per_token: int, left: int, longest: int) -> tuple[int, str]:
    widest = max(model.intermediate, 3 * model.hidden)
    best, reason = 8192, "enough to keep the device busy"
    if machine.kind == "cpu":
        best = max(256, min(8192, 2 ** int(math.log2(CPU_BLOCK / (4 * widest)))))
        reason = f"one activation of width {widest:,} stays below {CPU_BLOCK // 10**6} MB, which a CPU reuses fastest"
    while best > 256 and best * per_token > 0.5 * left:
        best //= 2
        reason = "more would not leave half of the free memory free"
    return max(16, min(best, 1 << 30)), reason


def _run_name(config: RunConfig) -> str:
    data = config.data.train_file
    stem = data.removeprefix("sample:").rpartition("/")[2].partition(".")[0] if isinstance(data, str) else "rows"
    model = str(config.model.name).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^a-z0-9]+", "-", f"{model}-{stem}".lower()).strip("-")
    return name[:64] or "run"


def _warnings(config: RunConfig, data: DataFacts, steps: int, warmup: int, examples: int) -> list[str]:
    found = []
    if warmup >= steps:
        found.append(
            f"warm-up takes {warmup} of {steps} steps, so the learning rate never reaches its peak; lower training.warmup_steps"
        )
    for knob in ("save_steps", "eval_steps"):
        every = getattr(config.training, knob)
        if every is not None and every > steps:
            found.append(f"training.{knob}={every} is more than the run's {steps} steps: it happens once, at the end")
    if not data.held_out:
        found.append("no held-out rows: overfitting cannot be seen; give data.eval_file or data.validation_split")
    if data.examples < examples:
        found.append(f"a step should take {examples} examples and there are only {data.examples}: each step takes all of them")
    return found


def _must_fit(plan: Plan, model: Any, dtype: str) -> None:
    if plan.peak_memory <= plan.available_memory:
        return
    raise MachineError(
        20,
        f"needs about {plan.peak_memory / 1e9:.1f} GB of memory and {plan.available_memory / 1e9:.1f} GB are free",
        where=model.name,
        why=", ".join(f"{part} {size / 1e9:.1f} GB" for part, size in plan.memory.items()),
        fix=_smaller(plan, dtype),
    )


def _smaller(plan: Plan, dtype: str) -> str:
    ideas = []
    if plan.config.method == "full":
        ideas.append("method=lora")
    if dtype == "float32":
        ideas.append("model.dtype=bfloat16")
    if not plan.config.training.gradient_checkpointing:
        ideas.append("training.gradient_checkpointing=true")
    ideas += [f"model.max_length={(plan.config.model.max_length or 512) // 2}", "a smaller model"]
    return "try " + ", or ".join(ideas[:3])
