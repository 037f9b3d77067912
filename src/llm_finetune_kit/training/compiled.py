"""Blocks compiled one for all: fewer and larger kernels, for models so small that a GPU waits for Python.

The layers of a model are alike, so what is compiled for one serves them all, and sizes are left open, so it serves passes of
all lengths. Evaluation and answers run as ever: caches and batches of other shapes would have it made anew.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from llm_finetune_kit.models.freezing import blocks
from llm_finetune_kit.training.step import Objective
from llm_finetune_kit.training.trial import no_trace, reason, small_pass

BACKEND = "inductor"


def compile_blocks(objective: Objective) -> str | None:
    """Have the model's blocks compiled; why they are as before, or None where they are.

    A small pass is computed at once, so that the time is spent before the first step, and a machine without a compiler is
    found out there. Must come before blocks are computed again (`recompute_blocks`).
    """
    model = objective.model
    found = list(blocks(model))
    for block in found:
        block.forward = partial(_in_training, block, block.forward, torch.compile(block.forward, dynamic=True, backend=BACKEND))
    try:
        with no_trace(model):
            model.train()
            objective.summed(small_pass()).backward()
    except Exception as error:  # dynamo, the compiler and its tools each raise their own
        for block in found:
            del block.__dict__["forward"]
        return reason(error)
    return None


def _in_training(block: Any, plain: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
    chosen = compiled if block.training and torch.is_grad_enabled() else plain
    return chosen(*args, **kwargs)
