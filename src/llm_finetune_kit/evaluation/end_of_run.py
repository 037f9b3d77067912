"""The comparison at the end of a run: the tuned model in memory against its base, on the run's held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from llm_finetune_kit.errors import KitError
from llm_finetune_kit.evaluation.asking import ALL, Prompt, how_many
from llm_finetune_kit.evaluation.comparison import Row, compared
from llm_finetune_kit.evaluation.metrics import chosen
from llm_finetune_kit.evaluation.sides import Questions, side
from llm_finetune_kit.events import Compared, Listen, Stage, Warned
from llm_finetune_kit.generation import Answer
from llm_finetune_kit.material import Material
from llm_finetune_kit.models.adapters import without_adapter
from llm_finetune_kit.models.loading import DTYPES, load_base
from llm_finetune_kit.plan.memory import BYTES
from llm_finetune_kit.training.step import Objective

FORGOTTEN = 0.1  # more bits per byte of general text than this share are worth a warning


def compare_run(objective: Any, material: Material, step: int, say: Listen) -> Row | None:
    """Compare and tell it as an event; None (with a warning) where it cannot be done.

    The losses of all held-out rows are computed, as in every evaluation of the run. Answers cost more: there are as
    many as the plan decided. A fault here does not cost the run.
    """
    config = material.plan.config
    if not config.evaluation.compare or material.held_out is None:
        return None
    missing = _no_base(objective, material)
    if missing:
        say(Warned(f"base and tuned are not compared: {missing}", "compare them later: finetune compare RUN"))
        return None
    say(Stage("compare", "base and tuned on held-out rows"))
    try:
        return _compare(objective, material, step, say)
    except (KitError, MemoryError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
        logging.getLogger("llm_finetune_kit").exception("the comparison failed")
        reason = " ".join(str(error).split())[:200]
        say(Warned(f"base and tuned are not compared: {reason}", "the model is saved; compare later: finetune compare RUN"))
        return None


def _compare(objective: Any, material: Material, step: int, say: Listen) -> Row:
    config = material.plan.config
    how, seed = config.evaluation.generation, config.training.seed
    asked = Questions.of(material.held_out, material.chat, positions=material.model.positions, seed=seed)
    metrics = chosen(config.evaluation.metrics, [prompt.reference for prompt in asked.prompts])
    count, why = how_many(len(asked.prompts), config.evaluation.rows, len(asked.prompts))
    prompts = asked.prompts[: count if metrics else 0]
    with base_of(objective, material) as base:
        before = side(str(material.located.name), base, asked, how, prompts=prompts, seed=seed)
    after = side("tuned", objective, asked, how, prompts=prompts, seed=seed)
    found = compared(
        before,
        after,
        prompts,
        metrics,
        place=material.held_out_place,
        why=why if why == ALL else "as many as were planned",
        of=len(asked.prompts),
        decoding=how.model_dump() | {"seed": seed},
        wanted=config.evaluation.metrics,
        seed=seed,
    )
    say(Compared(step, found))
    if prompts and (cut := cut_short(after.answers, prompts, material.chat, how.max_new_tokens)):
        say(cut)
    drift = found["general"]
    if drift["outcome"] == "worse" and drift["relative"] >= FORGOTTEN:
        say(Warned(drift["sentence"], "train for fewer steps or with a lower learning rate, or mix in general rows (data.mix)"))
    return found


def cut_short(answers: list[Answer], prompts: list[Prompt], chat: Any, limit: int) -> Warned | None:
    """A warning where most answers were cut at `limit` tokens while many of the references are longer than that."""
    ended = sum(one.stopped for one in answers)
    wanted = np.array([len(chat.tokenizer(prompt.reference).input_ids) for prompt in prompts])
    longer = int((wanted > limit).sum())
    if 2 * ended >= len(answers) or 4 * longer <= len(prompts):
        return None
    enough = 64 * int(np.ceil(np.quantile(wanted, 0.95) / 64))
    problem = f"{len(answers) - ended} of {len(answers)} answers were cut at {limit} tokens, and {longer} references are longer"
    why = "what is measured of answers is measured of their beginnings"
    fix = f"set evaluation.generation.max_new_tokens={enough}, or compare again: finetune compare RUN --max-new-tokens {enough}"
    return Warned(f"{problem}: {why}", fix)


def _no_base(objective: Any, material: Material) -> str:
    """Why there is no base to compare with, or nothing."""
    if hasattr(objective.model, "disable_adapter"):
        return ""
    plan = material.plan
    more = material.model.parameters * BYTES["float32"]
    if plan.needed_memory + more <= plan.available_memory:
        return ""
    return f"a second copy of the model takes {more / 1e9:.1f} GB, and the plan leaves less beside the training"


@contextmanager
def base_of(objective: Any, material: Material) -> Iterator[Any]:
    """The objective of the base: the same one with its adapter switched off, or the base loaded anew."""
    if hasattr(objective.model, "disable_adapter"):
        with without_adapter(objective.model):
            yield objective
        return
    precision = DTYPES[str(material.plan.config.model.dtype)]
    yield Objective(load_base(material.located, "float32", material.plan.device), precision)  # as the tuned one
