"""Two worst-case steps in the real engine: they put a plan on measured ground. Nothing is written or learned."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from llm_finetune_kit.data.batches import Pass, make_passes
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.hardware import peak_memory
from llm_finetune_kit.material import Material
from llm_finetune_kit.plan.speed import Measured
from llm_finetune_kit.training.assembly import assemble
from llm_finetune_kit.training.step import accumulate

PASSES = 2  # of a step, where it has more than one: from the second on the gradients stand beside the activations


def probe(material: Material, loaded: Any = None) -> Measured:
    """Time and memory of steps made of the longest rows, in passes as full as the plan allows.

    The learning rate is 0, so a `loaded` model keeps its weights. The time is that of the second step; the peak is this
    process's, so a probe is best run in a fresh one.
    """
    objective, optimizer, schedule = assemble(material, loaded)
    tokens = material.train if isinstance(material.train, Tokens) else material.shown
    passes = worst_passes(tokens, schedule.examples_per_step, schedule.tokens_per_pass, packing=schedule.packing)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    objective.model.train()
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        loss = accumulate(objective, passes)
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, schedule.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss)  # waits for a GPU
        seconds = time.perf_counter() - started
    longest = max(length for work in passes for length in work.lengths)
    return Measured(seconds, sum(work.tokens for work in passes), sum(work.targets for work in passes), longest, peak_memory())


def worst_passes(tokens: Tokens, examples: int, budget: int, *, packing: bool) -> list[Pass]:
    """The fullest passes, at most PASSES, that a step of the longest examples has."""
    longest = np.argsort(-tokens.lengths, kind="stable")[:examples]
    passes = make_passes(tokens, longest, budget, packing=packing)
    return sorted(passes, key=lambda work: -work.tokens)[:PASSES]
