"""A small pass that another way of computing is tried with before the first step, and that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llm_finetune_kit.data.batches import Pass
from llm_finetune_kit.training.checkpoint import random_state, restore_random_state
from llm_finetune_kit.training.room import is_out_of_memory

TRIED = (3, 2)  # tokens of its documents


def small_pass() -> Pass:
    """Two documents one after the other, all of whose tokens are learned."""
    count = sum(TRIED)
    positions = torch.cat([torch.arange(length) for length in TRIED])
    ids = torch.arange(count)
    return Pass(ids[None], positions[None], torch.ones(1, count, dtype=torch.bool), ids, TRIED)


def reason(error: Exception) -> str:
    """Why a trial failed, in a line. Raises the error where memory ran out, which no way of computing is to blame for."""
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def no_trace(model: Any) -> Iterator[None]:
    """The model's mode, its gradients (none) and all random numbers are afterwards as they were."""
    random, was_training = random_state(), model.training
    try:
        yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        restore_random_state(random)
