"""How long a run takes and what it costs, from counts of operations. Pure arithmetic; memory.py has the bytes.

A step's time is its matrix products at the machine's rate, attention's at the rate of its own number format, the
bytes that everything between them moves, and the optimizer. The machine's rates are measured here or come out of a table;
the shares of them that the engine reaches are measured constants. A probe replaces the sum's scale, not its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from llm_finetune_kit.plan.memory import STATE, Work, attention_bytes, block_bytes, drops, weight_bytes

REACHED = {"cuda": 0.6, "mps": 0.6}  # share of the matrix rate in a block's products; an assumption
# On a CPU that share is 1 / (LARGE + NARROWNESS / width of the model): set on steps of the demo model, SmolLM2-135M, GPT-2 and a
# Llama of width 2,048, LoRA and full, on one core of an AMD EPYC with avx512_bf16 (benchmarks/results/plan_times.jsonl).
LARGE, NARROWNESS = 1.32, 440.0
ATTENTION_REACHED = 0.25  # of the float32 rate, in attention on a CPU
DROPPED_PAIRS = 2.5e8  # pairs of tokens and heads a second and core where attention drops on a CPU: noise is drawn one by one
BANDWIDTH = {"cpu": 6e9, "cuda": 1e12, "mps": 1.5e11}  # bytes a second of kept activations, all passes over them counted
UNPACKING = {"cpu": 1.0e9, "cuda": 2e11, "mps": 1e10}  # packed weights a second
LAUNCHES = 0.0012  # seconds a block and pass take on a GPU however small it is: some 200 kernels
COMPILED_LAUNCHES = 0.4  # of that, where blocks are compiled; an assumption
COMPILING = 90.0  # seconds of compiling a block's forward and backward on a GPU; an assumption
DISK = 5e8  # bytes a second, written and checked: measured, there too
START = {"cpu": 3.3, "cuda": 12.0, "mps": 10.0}  # seconds of imports, reading the data and planning: measured on the CPU
LOADING = 1.0  # seconds of building a model and checking how its attention and its head behave
PACKING = 2e7  # weights a second into 4 bits
READING = {"cpu": 1e10, "cuda": 1e12, "mps": 1.5e11}  # bytes of weights a second, one token at a time
LAYER_CALLS = 4e-4  # seconds a layer takes for one token however small it is
SAVING = 0.1  # seconds of a checkpoint however small it is
REPORT = 0.7  # seconds of curves and pages at the end
SAMPLES = 3  # prompts that are answered before and after training
TOGETHER = 0.1  # share of the time of an answer by itself that one takes among 64: measured (docs/evaluation.md)
FEWEST_ANSWERED, MOST_ANSWERED = 4, 256  # prompts of a comparison; beyond them intervals hardly get narrower for the cost


@dataclass(frozen=True)
class Measured:
    """What a probe found. A step's figures are means over steps of the run's own order; times are in seconds."""

    step_seconds: float
    step_tokens: float
    step_targets: float
    step_examples: float
    steps: int  # that the means are of
    start: float  # from the weights' files to the first step
    evaluation: float  # of all held-out rows, once
    answers: float  # of all sample prompts, once
    peak_memory: int  # bytes, of steps made of the longest rows
    seconds: float = 0.0  # that the probe itself took


@dataclass(frozen=True)
class Rates:
    """Matrix products of a machine in FLOP/s, by number format, and its cores."""

    float32: float
    narrow: float
    cores: int
    source: str

    def of(self, dtype: str) -> float:
        return self.float32 if dtype == "float32" else self.narrow


# What a usual machine computes, where a decision must not depend on how busy this one is.
USUAL = {
    "cpu": Rates(1e11, 3e11, 2, "a usual CPU"),
    "cuda": Rates(3e13, 1.2e14, 8, "a usual GPU"),
    "mps": Rates(5e12, 5e12, 8, "a usual Apple GPU"),
}


def flops(model: Any, work: Work, tokens: float, targets: float) -> float:
    """Matrix products of a forward and backward pass, attention's core left out."""
    linear, head = model.linear_parameters, model.head_parameters
    again = math.ceil(model.layers / work.recompute) / model.layers if work.recompute else 0.0
    if work.full:
        return float(tokens * (6 + 2 * again) * linear + targets * 6 * head)
    return float(tokens * ((4 + 2 * again) * linear + 6 * work.trained) + targets * 4 * head)


def attention_flops(model: Any, work: Work, tokens: float, length: float) -> float:
    """Of causal attention inside documents of `length` tokens."""
    again = 2 if work.recompute else 0
    return float((6 + again) * model.layers * model.heads * model.head_dim * length * tokens)


def step_seconds(model: Any, work: Work, rates: Rates, tokens: float, targets: float, length: float) -> float:
    """Seconds of one optimizer step over `tokens` tokens in documents of `length`, in passes of at most `work.tokens`."""
    passes = max(1, math.ceil(tokens / work.tokens))
    device = work.device
    reached = REACHED.get(device, 1 / (LARGE + NARROWNESS / model.hidden))
    seconds = flops(model, work, tokens, targets) / (rates.of(work.dtype) * reached)
    core = attention_flops(model, work, tokens, length)
    if device == "cpu" and drops(model):
        pairs = model.layers * model.heads * length * tokens * (2 if work.recompute else 1)
        seconds += pairs / (DROPPED_PAIRS * math.sqrt(rates.cores))
    elif device == "cpu":
        seconds += core / (rates.float32 * ATTENTION_REACHED)
    else:
        seconds += core / (rates.narrow * reached)
    block = (block_bytes(model, work) - attention_bytes(model, work)) / work.tokens
    seconds += model.layers * block * tokens * (1.4 if work.recompute else 1.0) / BANDWIDTH[device]
    if work.quantization:
        seconds += passes * model.linear_parameters * (3 if work.recompute else 2) / UNPACKING[device]
    if work.full:
        seconds += passes * 6 * model.parameters / BANDWIDTH[device]
    seconds += 28 * work.trained / (2 * BANDWIDTH[device])
    launches = LAUNCHES * (COMPILED_LAUNCHES if work.compiled else 1.0)
    return float(max(seconds, passes * model.layers * launches if device == "cuda" else 0.0))


def evaluation_seconds(model: Any, work: Work, rates: Rates, tokens: float, length: float) -> float:
    """Seconds of the loss of `tokens` held-out tokens: a forward pass, which is a third of a full step."""
    once = Work("full", work.dtype, work.tokens, work.longest, device=work.device, trained=0)
    return step_seconds(model, once, rates, tokens, tokens, length) / 3


def answers_seconds(model: Any, work: Work, prompts: int, tokens: int) -> float:
    """Seconds of answering `prompts` prompts with `tokens` tokens each: every token reads all weights once."""
    once = weight_bytes(model, replace(work, method="lora", quantization=None)) / READING[work.device]
    unpacked = model.linear_parameters / UNPACKING[work.device] if work.quantization else 0.0
    return prompts * tokens * float(once + unpacked + model.layers * LAYER_CALLS)


def prompts_within(seconds: float, alone: float) -> int:
    """How many prompts two models answer in that time, where an answer by itself takes `alone` seconds."""
    return min(MOST_ANSWERED, max(FEWEST_ANSWERED, int(seconds / (2 * TOGETHER * alone))))


def start_seconds(model: Any, work: Work) -> float:
    """Seconds from the weights' files to the first step; what is packed is read and packed."""
    packing = model.linear_parameters / PACKING if work.quantization else 0.0
    return float(LOADING + weight_bytes(model, work) / 1e9 + packing + (COMPILING if work.compiled else 0.0))


def run_seconds(
    work: Work, *, step: float, steps: int, evaluation: float, evaluations: int, answers: float, saves: int, start: float
) -> dict[str, float]:
    """Seconds by part of a whole run; each argument but `step` and `evaluation` is of all of it."""
    files = (4.0 + STATE[work.optimizer]) * work.trained
    parts = {
        "start": START[work.device] + start,
        "training": step * steps,
        "evaluation": evaluation * evaluations,
        "answers": answers,
        "saving": (saves + 1) * (SAVING + files / DISK),
        "report": REPORT,
    }
    return parts | {"total": sum(parts.values())}
