"""What to do when memory runs out: the same step again in smaller passes, which is the same mathematics."""

from __future__ import annotations

import re

import torch

from llm_finetune_kit.data.batches import Pass
from llm_finetune_kit.errors import TrainingError

FEWEST = 16  # tokens of a pass, below which nothing is gained
# what torch, the system and oneDNN say; the last is oneDNN's when it cannot place a kernel
SAID = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|bad_alloc|could not create a primitive", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a driver means that memory ran out (a CPU's is a plain RuntimeError)."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and SAID.search(str(error)) is not None
    )


def smaller(passes: list[Pass], budget: int, step: int, place: str) -> int:
    """Tokens that a pass may have after `passes` did not fit: the budget halved, often enough that the largest one is split.

    `place` is that of the longest row.

    Raises TrainingError where the largest pass is a single row, which cannot be split.
    """
    largest = max(passes, key=lambda work: work.tokens)
    if len(largest.lengths) == 1 or largest.tokens <= FEWEST:
        raise TrainingError(
            4,
            f"memory does not suffice for one row of {largest.tokens:,} tokens in step {step}",
            where=place,
            why="passes were made as small as one row; nothing of this step was applied",
            fix=f"set training.gradient_checkpointing=true, model.quantization=nf4 or model.max_length={largest.tokens // 2}",
        )
    while budget >= largest.tokens:
        budget //= 2
    return max(FEWEST, budget)
