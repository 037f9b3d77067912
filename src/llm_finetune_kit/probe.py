"""Some steps of a run in the real engine, before it: they put a plan on measured ground. Nothing is written or learned.

One step of the longest rows shows the memory; steps of the run's own order, with passes of ever new lengths as they will
come, show the time. Evaluation and answers are timed on a part and reckoned for the whole.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from llm_finetune_kit.data.batches import Pass, evaluation_passes, make_passes, step_tokens
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.hardware import peak_memory, release_memory
from llm_finetune_kit.material import Material
from llm_finetune_kit.plan.speed import Measured
from llm_finetune_kit.training.assembly import assemble
from llm_finetune_kit.training.step import accumulate, mean_loss

PASSES = 2  # of the worst step, where it has more than one: from the second on the gradients stand beside the activations
STEPS = 12  # that are timed at most, and
SECONDS = 8.0  # after which no other is begun, once there are
FEWEST = 3
EVALUATING = 2.0  # seconds after which no other pass is evaluated
NEW_TOKENS = 8  # of the answer that is timed


def probe(material: Material, loaded: Any = None) -> Measured:
    """Time and memory of a run's steps, evaluation and answers, in some 10 s for small models and more for slow ones.

    The learning rate is 0, so a `loaded` model keeps its weights. The peak is this process's, so a probe is best run in a
    fresh one. The first step is not timed: it sets up what the others use.
    """
    began = time.perf_counter()
    objective, optimizer, schedule = assemble(material, loaded)
    start = time.perf_counter() - began
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    tokens = material.train if isinstance(material.train, Tokens) else material.shown
    worst = worst_passes(tokens, schedule.examples_per_step, schedule.tokens_per_pass, packing=schedule.packing)
    _step(objective, optimizer, schedule, _passes(material, schedule, 0)[1])
    _step(objective, optimizer, schedule, worst)
    peak = peak_memory()
    if objective.device.type == "cpu":
        release_memory()
    counts, seconds = _typical(material, objective, optimizer, schedule)
    mean_tokens, mean_targets, mean_examples = np.mean(counts, axis=0).tolist()
    return Measured(
        step_seconds=sum(seconds) / len(seconds),
        step_tokens=mean_tokens,
        step_targets=mean_targets,
        step_examples=mean_examples,
        steps=len(seconds),
        start=start,
        evaluation=_evaluation(objective, material.held_out, schedule),
        answers=_answers(objective, material),
        peak_memory=peak,
        seconds=time.perf_counter() - began,
    )


def worst_passes(tokens: Tokens, examples: int, budget: int, *, packing: bool) -> list[Pass]:
    """The fullest passes, at most PASSES, that a step of the longest examples has."""
    longest = np.argsort(-tokens.lengths, kind="stable")[:examples]
    passes = make_passes(tokens, longest, budget, packing=packing)
    return sorted(passes, key=lambda work: -work.tokens)[:PASSES]


def _passes(material: Material, schedule: Any, step: int) -> tuple[Tokens, list[Pass]]:
    examples = step_tokens(material.train, schedule.examples_per_step, schedule.seed, step)
    return examples, make_passes(examples, range(len(examples)), schedule.tokens_per_pass, **schedule.arranged)


def _step(objective: Any, optimizer: Any, schedule: Any, passes: list[Pass]) -> None:
    """What the loop does in a step, at a learning rate of 0."""
    objective.model.train()
    loss = accumulate(objective, passes)
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, schedule.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    float(loss)  # waits for a GPU


def _typical(material: Material, objective: Any, optimizer: Any, schedule: Any) -> tuple[list[tuple[int, int, int]], list[float]]:
    """Tokens, targets and examples of steps that the run will have after its first, and the seconds that each took."""
    counts: list[tuple[int, int, int]] = []
    seconds: list[float] = []
    while len(seconds) < STEPS and (len(seconds) < FEWEST or sum(seconds) < SECONDS):
        began = time.perf_counter()
        examples, passes = _passes(material, schedule, 1 + len(seconds))
        _step(objective, optimizer, schedule, passes)
        seconds.append(time.perf_counter() - began)
        counts.append((len(examples.ids), int(examples.targets.sum()), len(examples)))
    return counts, seconds


def _evaluation(objective: Any, held_out: Tokens | None, schedule: Any) -> float:
    """Seconds of one evaluation, from as many passes as EVALUATING allows."""
    if held_out is None:
        return 0.0
    passes = list(evaluation_passes(held_out, schedule.tokens_per_pass, **schedule.arranged))
    began, done = time.perf_counter(), 0
    for work in passes:
        mean_loss(objective, [work])
        done += work.tokens
        if time.perf_counter() - began > EVALUATING:
            break
    return (time.perf_counter() - began) * sum(work.tokens for work in passes) / max(1, done)


def _answers(objective: Any, material: Material) -> float:
    """Seconds of all sample answers at their full length, from their beginnings."""
    from llm_finetune_kit.generation import answers
    from llm_finetune_kit.generation.samples import sample_prompts

    prompts, how = [ids for ids, _, _ in sample_prompts(material)], material.plan.config.evaluation.generation
    if not prompts:
        return 0.0
    few = min(NEW_TOKENS, how.max_new_tokens)
    seconds = []
    for count in (1, few):  # the first one pays for what is set up once
        began = time.perf_counter()
        with objective.precision():
            answers(objective.model, material.chat, prompts, how.model_copy(update={"max_new_tokens": count}))
        seconds.append(time.perf_counter() - began)
    return seconds[-1] * how.max_new_tokens / few
