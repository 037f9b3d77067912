"""The training loop, whole. Everything the optimizer sees happens on this page."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from llm_finetune_kit.data.batches import Pass, evaluation_passes, make_passes, step_tokens, steps_per_epoch
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.errors import TrainingError
from llm_finetune_kit.events import Evaluated, Listen, Noted, Stepped, Warned
from llm_finetune_kit.hardware import held_memory, release_memory, resident_memory
from llm_finetune_kit.training.checkpoint import Progress, random_state, restore_random_state
from llm_finetune_kit.training.room import is_out_of_memory, smaller
from llm_finetune_kit.training.step import Objective, accumulate, mean_loss

GROWTH = 1.1  # times what a first step took, from which on a CPU's unused memory is given back
TOLD = 0.1  # of a step's tokens, from which on shared beginnings are told
SPIKE = 4.0  # times the usual loss, from which on a loss is told as a spike
USUAL = 0.9  # share of the past in the usual loss, a running mean


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
    sharing: int | None = None  # tokens from which what prompts begin with alike is computed once, if the model is able to
    sample_steps: int | None = None  # between answers during training; without it there are none

    @property
    def steps(self) -> int:
        return len(self.rates)

    @property
    def arranged(self) -> dict[str, Any]:
        """How examples become passes, as `make_passes` and `evaluation_passes` take it."""
        return {"packing": self.packing, "sharing": self.sharing}


class _Stopped(Exception):
    """An evaluation was left because the run is to stop."""


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
    place: Callable[[int], str] = lambda row: f"row {row + 1}",
    sample: Callable[[int], bool] = lambda step: True,
) -> str:
    """Train from `progress.step` to the end of the schedule and return why it ended.

    `train` is a `masks.Tokens` or a `streaming.Stream`; `place` turns a row of it into its file and line. `sample` has the
    model answer after a step, without a trace in weights and random states, and says whether it came to its end.

    Reasons: `all steps done`, `no improvement` (early stopping), `asked to stop` (saved at a step boundary).
    Raises TrainingError before the optimizer moves if the loss or a gradient is not finite, or if not even one row
    fits into memory; and at the end if no step moved anything.
    """
    saved, settled = progress.step, 0
    while True:
        improved = False
        if progress.evaluated < progress.step and _due(progress.step, schedule.eval_steps, schedule.steps):
            with suppress(_Stopped):  # it is made up for when the run goes on
                improved = held_out is not None and evaluate(objective, held_out, schedule, progress, listen, asked_to_stop)
        if _sample_due(progress, schedule) and not asked_to_stop() and sample(progress.step):
            progress.sampled = progress.step
        stopping = asked_to_stop()
        patient = schedule.patience is None or progress.stale_evaluations < schedule.patience
        new = saved < progress.step
        if improved or (new and (stopping or not patient or _due(progress.step, schedule.save_steps, schedule.steps))):
            save(progress)
            saved = progress.step
        if stopping:
            return "asked to stop"
        if progress.step >= schedule.steps:
            break
        if not patient:
            return "no improvement"
        _one_step(objective, optimizer, train, schedule, progress, listen, place)
        settled = _kept_small(settled) if objective.device.type == "cpu" else 0
    if not progress.moved:
        why = "every gradient was zero: nothing that is trained has a part in the loss"
        raise TrainingError(2, "the run trained nothing", why=why, fix="check lora.target_modules, the data and its masks")
    return "all steps done"


def _kept_small(settled: int) -> int:
    """Give unused memory back where the process has grown; `settled` is what it held after its first step since the last time.

    Passes of ever new lengths leave holes between the blocks of the C library's heap, some 2 % more with every step.
    """
    held = resident_memory()
    if not settled:
        return held
    if held < GROWTH * settled:
        return settled
    release_memory()
    return 0


def _due(step: int, every: int, last: int) -> bool:
    return step > 0 and (step % every == 0 or step == last)


def _sample_due(progress: Progress, schedule: Schedule) -> bool:
    """Whether the model is to answer now; after the last step the run asks what it keeps, which may be of another step."""
    every = schedule.sample_steps
    return every is not None and progress.sampled < progress.step < schedule.steps and progress.step % every == 0


def _one_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    train: Any,
    schedule: Schedule,
    progress: Progress,
    listen: Listen,
    place: Callable[[int], str],
) -> None:
    started = time.perf_counter()
    rate = schedule.rates[progress.step]
    examples = step_tokens(train, schedule.examples_per_step, schedule.seed, progress.step)
    if not examples.targets.any():
        progress.step += 1
        fix = "shorter prompts, or a larger model.max_length"
        listen(Warned(f"step {progress.step} is left out: none of its examples has a token to learn", fix))
        return
    objective.model.train()
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaling = progress.loss_scale
    while True:
        mean, passes = _gradient(objective, optimizer, examples, schedule, progress, listen, place)
        if scaling:
            scaling.unscale(weights)
        length = torch.nn.utils.clip_grad_norm_(weights, schedule.max_grad_norm)
        loss, norm = torch.stack([mean, length]).tolist()  # the only place of a step where a GPU is waited for
        if scaling is None or math.isfinite(norm) or not math.isfinite(loss):
            break
        scaling.shrink()  # float16 overflowed: the same step again, nothing moved and nothing is counted
        optimizer.zero_grad(set_to_none=True)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise _not_finite(loss, norm, progress.step + 1, [place(row) for row in _unsound(objective, examples, schedule)])
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    optimizer.step()
    if scaling:
        scaling.grow()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    targets, tokens = sum(work.targets for work in passes), sum(work.tokens + work.shared for work in passes)
    progress.step += 1
    progress.tokens += tokens
    progress.seconds += seconds
    shared = sum(work.shared for work in passes)
    if progress.step == 1 and shared > TOLD * tokens:
        listen(Noted(f"{shared:,} of {tokens:,} tokens of this step are beginnings that prompts share: each is computed once"))
    per_epoch = steps_per_epoch(len(train), schedule.examples_per_step)
    epoch = progress.step / per_epoch
    listen(Stepped(progress.step, schedule.steps, epoch, loss, rate, norm, tokens, targets, seconds, held_memory()))
    _watch(progress, loss, norm, rate, listen)


def _gradient(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    examples: Tokens,
    schedule: Schedule,
    progress: Progress,
    listen: Listen,
    place: Callable[[int], str],
) -> tuple[torch.Tensor, list[Pass]]:
    """The step's loss, its gradient in `.grad`, and the passes that it took; where memory runs out, again in smaller ones."""
    scale = progress.loss_scale.scale if progress.loss_scale else 1.0
    while True:
        budget = progress.tokens_per_pass or schedule.tokens_per_pass
        passes = make_passes(examples, range(len(examples)), budget, **schedule.arranged)
        random = random_state()
        try:
            return accumulate(objective, passes, scale), passes
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        optimizer.zero_grad(set_to_none=True)  # past the except: until there the error holds the activations
        restore_random_state(random)
        longest = place(int(examples.rows[examples.lengths.argmax()]))
        _shrink(smaller(passes, budget, progress.step + 1, longest), progress, listen, f"step {progress.step + 1}")


def _shrink(budget: int, progress: Progress, listen: Listen, during: str) -> None:
    progress.tokens_per_pass = budget
    gc.collect()  # parts of the failed pass may refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_memory()
    message = f"memory ran out in {during}; it is done again in passes of at most {budget:,} tokens, as all after it"
    listen(Warned(message, f"the result is the same; to start so: training.tokens_per_pass={budget}"))


def _watch(progress: Progress, loss: float, norm: float, rate: float, listen: Listen) -> None:
    """Warn of what often means that something is wrong."""
    if norm == 0:
        if progress.idle == 0:
            listen(Warned(f"the gradient of step {progress.step} is zero: it taught nothing", "check the data and its masks"))
        progress.idle += 1
    elif rate > 0:
        progress.moved += 1
    usual = progress.usual_loss
    if usual is not None and loss > SPIKE * max(usual, 0.1):
        fix = "if it stays so high, resume from an earlier checkpoint with a lower training.learning_rate"
        listen(Warned(f"the loss of step {progress.step} is {loss:.3g}, where it was about {usual:.3g} before", fix))
    progress.usual_loss = loss if usual is None else USUAL * usual + (1 - USUAL) * loss


@torch.no_grad()
def _unsound(objective: Objective, examples: Tokens, schedule: Schedule) -> list[int]:
    """Rows whose loss is not finite by themselves; all of the step where each is finite alone."""
    objective.model.eval()
    bad = [
        index
        for index in range(len(examples))
        for work in make_passes(examples, [index], schedule.tokens_per_pass)
        if not math.isfinite(float(objective.summed(work)))
    ]
    return [int(row) for row in (examples.rows[bad] if bad else examples.rows)]


def _not_finite(loss: float, norm: float, step: int, places: list[str]) -> TrainingError:
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    return TrainingError(
        1,
        f"the loss is {loss} and the gradient norm is {norm} at step {step}",
        where=", ".join(places[:5]) + more,
        why="the optimizer was stopped before it moved, so the weights are those of the last step",
        fix="look at these rows; else lower training.learning_rate, or set model.dtype=float32",
    )


def evaluate(
    objective: Objective,
    held_out: Tokens,
    schedule: Schedule,
    progress: Progress,
    listen: Listen,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Held-out loss now, told as an event; whether it is the best so far, which `progress` remembers."""
    started = time.perf_counter()
    loss, targets = _held_out_loss(objective, held_out, schedule, progress, listen, asked_to_stop)
    best = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
    if not math.isfinite(loss):
        listen(Warned(f"the held-out loss after step {progress.step} is {loss}", "lower training.learning_rate"))
    if best:
        progress.best_loss, progress.best_step, progress.stale_evaluations = loss, progress.step, 0
    else:
        progress.stale_evaluations += 1
    progress.evaluated = progress.step
    perplexity = math.exp(min(loss, 700.0))
    seconds = time.perf_counter() - started
    listen(Evaluated(progress.step, loss, perplexity, len(held_out), targets, seconds, best))
    return best


def _held_out_loss(
    objective: Objective,
    held_out: Tokens,
    schedule: Schedule,
    progress: Progress,
    listen: Listen,
    asked_to_stop: Callable[[], bool],
) -> tuple[float, int]:
    """Mean loss and targets, in smaller passes where memory runs out. Raises _Stopped where the run is to stop."""
    done: list[Pass] = []  # only the last one

    def passes(budget: int) -> Iterator[Pass]:
        for work in evaluation_passes(held_out, budget, **schedule.arranged):
            if asked_to_stop():
                raise _Stopped
            done[:] = [work]
            yield work

    while True:
        budget = progress.tokens_per_pass or schedule.tokens_per_pass
        try:
            return mean_loss(objective, passes(budget))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        during = f"the evaluation after step {progress.step}"
        _shrink(smaller(done, budget, progress.step, "held-out rows"), progress, listen, during)
