"""Recomputing activations in the backward pass: memory for time, block by block."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from llm_finetune_kit.models.freezing import blocks


def recompute_blocks(model: Any, every: int) -> None:
    """Keep only the input of every n-th block and compute its inside again when its gradient is due.

    `every` is 1 for all blocks, 2 for every second one, 0 for none; it may be called again to change that. It
    works at training time only, and draws the same dropout twice.
    """
    for place, block in enumerate(blocks(model)):
        forward = block.forward
        if isinstance(forward, partial) and forward.func is _recomputed:
            forward = block.forward = forward.args[1]
        if every and place % every == 0:
            block.forward = partial(_recomputed, block, forward)


def _recomputed(block: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
