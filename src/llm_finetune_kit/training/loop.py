"""The training loop, whole. Everything the optimizer sees happens on this page."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llm_finetune_kit.data.batches import evaluation_passes, make_passes, step_tokens, steps_per_epoch
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.errors import TrainingError
from llm_finetune_kit.events import Evaluated, Listen, Stepped
from llm_finetune_kit.hardware import release_memory
from llm_finetune_kit.training.checkpoint import Progress
from llm_finetune_kit.training.step import Objective, accumulate, mean_loss

RELEASE_EVERY = 10  # steps between giving unused memory back: rare enough to cost nothing


@dataclass(frozen=True)
class Schedule:
    """The decided numbers that the loop runs by; all counts are in optimizer steps."""

    rates: list[float]
    examples_per_step: int
    tokens_per_pass: int
    packing: bool
    max_grad_norm: float
    eval_steps: int
    save_steps: int
    patience: int | None
    seed: int
    scaled: bool = False  # float16 products, whose loss is scaled

    @property
    def steps(self) -> int:
        return len(self.rates)


def fit(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    train: Any,
    held_out: Tokens | None,
    schedule: Schedule,
    progress: Progress,
    save: Callable[[Progress], None],
    listen: Listen,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train from `progress.step` to the end of the schedule and return why it ended.

    `train` is a `masks.Tokens` or a `streaming.Stream`.

    Reasons: `all steps done`, `no improvement` (early stopping), `asked to stop` (saved at a step boundary).
    Raises TrainingError before the optimizer moves if the loss or a gradient is not finite.
    """
    while progress.step < schedule.steps:
        if schedule.patience is not None and progress.stale_evaluations >= schedule.patience:
            return "no improvement"
        if progress.step % RELEASE_EVERY == 0 and objective.device.type == "cpu":
            release_memory()
        _one_step(objective, optimizer, train, schedule, progress, listen)
        improved = False
        if held_out is not None and _due(progress.step, schedule.eval_steps, schedule.steps):
            improved = evaluate(objective, held_out, schedule, progress, listen)
        stopping = asked_to_stop()
        if improved or stopping or _due(progress.step, schedule.save_steps, schedule.steps):
            save(progress)
        if stopping and progress.step < schedule.steps:
            return "asked to stop"
    return "all steps done"


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _one_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    train: Any,
    schedule: Schedule,
    progress: Progress,
    listen: Listen,
) -> None:
    started = time.perf_counter()
    rate = schedule.rates[progress.step]
    examples = step_tokens(train, schedule.examples_per_step, schedule.seed, progress.step)
    passes = make_passes(examples, range(len(examples)), schedule.tokens_per_pass, packing=schedule.packing)
    objective.model.train()
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaling = progress.loss_scale
    while True:
        loss = float(accumulate(objective, passes, scaling.scale if scaling else 1.0))
        if scaling:
            scaling.unscale(weights)
        norm = float(torch.nn.utils.clip_grad_norm_(weights, schedule.max_grad_norm))
        if scaling is None or math.isfinite(norm) or not math.isfinite(loss):
            break
        scaling.shrink()  # float16 overflowed: the same step again, nothing moved and nothing is counted
        optimizer.zero_grad(set_to_none=True)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            1,
            f"the loss is {loss} and the gradient norm is {norm} at step {progress.step + 1}",
            where="rows " + ", ".join(str(row + 1) for row in examples.rows),
            why="the optimizer was stopped before it moved, so the weights are those of the last step",
            fix="lower training.learning_rate, or set model.dtype=float32",
        )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    optimizer.step()
    if scaling:
        scaling.grow()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    progress.step += 1
    progress.tokens += sum(work.tokens for work in passes)
    progress.seconds += seconds
    per_epoch = steps_per_epoch(len(train), schedule.examples_per_step)
    targets = sum(work.targets for work in passes)
    tokens = sum(work.tokens for work in passes)
    listen(Stepped(progress.step, schedule.steps, progress.step / per_epoch, loss, rate, norm, tokens, targets, seconds))


def evaluate(objective: Objective, held_out: Tokens, schedule: Schedule, progress: Progress, listen: Listen) -> bool:
    """Held-out loss now, told as an event; whether it is the best so far, which `progress` remembers."""
    started = time.perf_counter()
    passes = evaluation_passes(held_out, schedule.tokens_per_pass, packing=schedule.packing)
    loss, targets = mean_loss(objective, passes)
    best = progress.best_loss is None or loss < progress.best_loss
    if best:
        progress.best_loss, progress.best_step, progress.stale_evaluations = loss, progress.step, 0
    else:
        progress.stale_evaluations += 1
    perplexity = math.exp(min(loss, 700.0))
    seconds = time.perf_counter() - started
    listen(Evaluated(progress.step, loss, perplexity, len(held_out), targets, seconds, best))
    return best
