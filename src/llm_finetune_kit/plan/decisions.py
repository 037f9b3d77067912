"""The single decisions of a plan, each with its reason: number format, length, adapter, learning rate, steps and habits.

What concerns memory as a whole is decided in fitting.py. Pure; `config` is a RunConfig, `model` a ModelFacts and `data`
a DataFacts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from llm_finetune_kit.catalog import MODELS, short_name
from llm_finetune_kit.config import SHORTEST
from llm_finetune_kit.errors import ConfigError
from llm_finetune_kit.plan.speed import COMPILING, MOST_ANSWERED, prompts_within

RANK = 16  # of adapters, where the catalog knows no other
CPU_BLOCK = 30_000_000  # bytes of one activation above which a CPU's allocator page-faults every time
ANSWERING = 5.0  # seconds for the answers of base and tuned: long enough for some dozens of them from a small model
ANSWERED = 0.05  # of the training time, where that is more
SAMPLING = 0.03  # of the training time may go into sample answers that nobody asked for
PAYS = 2.0  # times the seconds of compiling that it has to save
SMALL = 3_000_000_000  # parameters of a model, from which on kernels are long enough to hide their launches
MOST_TOKENS = 8192  # of a pass on a GPU: enough to keep it busy


@dataclass(frozen=True)
class Choice:
    """One decision: the knob, its value and why."""

    knob: str
    value: Any
    reason: str


class Decisions:
    """Every decision, in order, and the knobs' values."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.values: dict[str, Any] = {}

    def __call__(self, knob: str, asked: Any, value: Any, reason: str) -> Any:
        choice = Choice(knob, value, reason) if asked is None else Choice(knob, asked, "you asked for it")
        self.choices.append(choice)
        self.values[knob] = choice.value
        return choice.value

    def tell(self, subject: str, value: Any, reason: str) -> None:
        """A decision that no knob changes."""
        self.choices.append(Choice(subject, value, reason))


def number_format(machine: Any) -> tuple[str, str]:
    if machine.bfloat16:
        return "bfloat16", machine.why_bfloat16
    if machine.kind == "cuda":
        return "float16", f"{machine.why_bfloat16}; the loss is scaled so that small gradients survive"
    return "float32", f"{machine.why_bfloat16}, and float16 is slow there"


def max_length(model: Any, data: Any) -> tuple[int, str]:
    if data.streamed and 2 * data.longest < model.positions:
        return 2 * data.longest, "twice the longest of the sampled examples, as the others are not known yet"
    if data.estimated and data.longest <= model.positions:
        return max(SHORTEST, data.longest), "the longest example as it is estimated; a run counts its tokens and decides anew"
    if data.longest < SHORTEST:
        return SHORTEST, f"the least there is; the longest example has {data.longest} tokens"
    if data.longest <= model.positions:
        return data.longest, "the longest example; nothing is cut, and short ones cost nothing extra"
    about = "about " if data.estimated else ""
    return model.positions, f"the model's limit; the longest example has {about}{data.longest:,} tokens"


def adapter(config: Any, model: Any, decide: Decisions) -> list[str]:
    """The layers that get an adapter; its rank and strength are decided too. Raises ConfigError for unknown layers."""
    known = MODELS.get(short_name(model.name) or "")
    usual = RANK if known is None else known.lora_r
    reason = "enough for instruction data" if known is None or usual == RANK else f"the usual rank of {known.hub_id}"
    r = decide("lora.r", config.lora.r, usual, reason)
    decide("lora.alpha", config.lora.alpha, 2 * r, "twice r")
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
    return list(targets)


def trained_parameters(config: Any, model: Any, r: int, targets: list[str]) -> int:
    """Weights that the optimizer moves."""
    if config.method == "full":
        frozen = config.training.freeze_layers
        kept: int = model.embedding_parameters + frozen * model.block_parameters if frozen else 0
        return int(model.parameters) - kept
    lora = config.lora
    count: int = model.lora_parameters(r, targets)
    if lora.variant == "dora":
        count += sum(outputs for name, _, outputs in model.linear_shapes if name in targets)
    whole = {"lm_head": model.head_parameters}
    count += sum(whole.get(name, model.embedding_parameters) for name in lora.modules_to_save or [])
    return count + (model.bias_parameters if lora.bias == "all" else 0)


def learning_rate(method: str, hidden: int) -> tuple[float, str]:
    """2e-4 (LoRA) and 2e-5 (full) are the field's defaults at width 4096; narrower models want more."""
    base = 2e-4 if method == "lora" else 2e-5
    rate = float(f"{base * math.sqrt(4096 / hidden):.1e}")
    return rate, f"{base:g} for a model 4096 wide, times sqrt(4096 / {hidden})"


def step_counts(config: Any, data: Any, examples: int) -> tuple[int, int]:
    """Optimizer steps of the run, and of its warm-up."""
    training = config.training
    per_epoch = -(-data.examples // examples)
    steps = training.max_steps or max(1, math.ceil(training.num_epochs * per_epoch))
    warmup = training.warmup_steps if training.warmup_steps is not None else math.ceil(training.warmup_ratio * steps)
    return steps, warmup


def best_tokens(machine: Any, model: Any) -> tuple[int, str]:
    """Tokens of a pass that a device computes fastest."""
    if machine.kind != "cpu":
        return MOST_TOKENS, "enough to keep the device busy"
    width = max(model.intermediate, 3 * model.hidden)
    best = max(256, min(MOST_TOKENS, 2 ** int(math.log2(CPU_BLOCK / (4 * width)))))
    return best, f"one activation of width {width:,} stays below {CPU_BLOCK // 10**6} MB, which a CPU reuses fastest"


def compiling(model: Any, quantization: str | None, liger: bool, plain: float, compiled: float) -> tuple[bool, str]:
    """Whether a GPU's blocks are compiled; `plain` and `compiled` are seconds of all steps by either way."""
    if liger:
        return False, "training.liger asks for kernels of its own"
    if quantization is not None:
        return False, "weights are unpacked by kernels that are not torch's"
    if model.parameters >= SMALL:
        return False, "its kernels are long enough to hide their launches"
    saved = plain - compiled
    if saved < PAYS * COMPILING:
        return False, f"about {saved:.0f} s would be saved, and compiling takes about {COMPILING:.0f}"
    return True, f"the GPU would wait for launches, about {saved:.0f} s of them; compiling takes about {COMPILING:.0f}"


def fusing(model: Any, machine: Any, compiled: bool) -> tuple[bool, str]:
    """Whether Liger's kernels compute norms and rotary positions on a GPU."""
    if machine.kind != "cuda" or machine.rocm:
        return False, "Liger's kernels are meant for NVIDIA's GPUs"
    if not machine.bfloat16:
        return False, "Triton, which compiles Liger's kernels, is for GPUs of compute capability 8.0 and above"
    if compiled:
        return False, "the compiler fuses the same"
    if model.learned_positions:
        return False, "its norms and positions are of kinds that Liger's kernels do not help with"
    if not machine.liger:
        return False, "liger-kernel is not installed; with it they take one kernel each: pip install 'llm-finetune-kit[gpu]'"
    return True, "norms and rotary positions take one kernel each instead of several"


def habits(config: Any, machine: Any, data: Any, steps: int, decide: Decisions) -> None:
    """How often to evaluate and save, when to stop, and with how many threads."""
    training, tenth = config.training, max(1, steps // 10)
    decide("training.eval_steps", training.eval_steps, tenth, "ten evaluations in a run")
    decide("training.save_steps", training.save_steps, tenth, "at most a tenth of the run can be lost")
    if data.held_out:
        asked = training.early_stopping_patience
        decide("training.early_stopping_patience", asked, 3, "three evaluations without improvement are no accident")
    waits = ("pause", "somebody at the terminal can free space") if machine.attended else ("stop", "nobody sits at a terminal")
    decide("training.on_disk_full", training.on_disk_full, *waits)
    if machine.kind == "cpu":
        decide("training.threads", training.threads, machine.cores, "the cores that this process may use")


def sampling(answers: float, every: int, steps: int) -> tuple[int, str]:
    """Steps between sample answers, which take as long as `answers` steps: at evaluations `every` so many steps, or fewer."""
    times = max(1, math.ceil(answers / (SAMPLING * every)))
    if times * every >= steps:
        return steps, f"before and after training only: between them, answers would cost more than {SAMPLING:.0%} of its time"
    if times == 1:
        return every, "at every evaluation"
    return times * every, f"one evaluation in {times}, so that answers cost at most {SAMPLING:.0%} of the training time"


def answered(alone: float, training: float, held_out: int) -> tuple[int, str]:
    """Held-out prompts that base and tuned answer at the end, where one by itself takes `alone` seconds on a usual machine."""
    allowed = max(ANSWERING, ANSWERED * training)
    count = prompts_within(allowed, alone)
    if count >= held_out:
        return held_out, "all held-out rows"
    most = "more would hardly narrow the intervals" if count == MOST_ANSWERED else f"about {allowed:.0f} s on a usual machine"
    return count, f"{most}; their losses are measured on all {held_out:,} held-out rows"


def run_name(config: Any) -> str:
    data = config.data.train_file
    stem = data.removeprefix("sample:").rpartition("/")[2].partition(".")[0] if isinstance(data, str) else "rows"
    model = str(config.model.name).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^a-z0-9]+", "-", f"{model}-{stem}".lower()).strip("-")
    return name[:64] or "run"


def warnings(config: Any, data: Any, steps: int, warmup: int, examples: int) -> list[str]:
    """What the settings of the steps will do that was hardly meant."""
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
