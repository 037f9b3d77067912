"""What it brings to compute layers of a block together: passes with and without it in random turns, two threads.

python benchmarks/speed.py --shape tinyllama --contenders ours --rounds 1      # once: freezes the shape and rows of Alpaca
python benchmarks/together.py --frozen .bench/speed/tinyllama-alpaca/frozen
"""

# ruff: noqa: E402
from __future__ import annotations

from llm_finetune_kit.hardware import share_the_machine

share_the_machine()

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_finetune_kit.data.batches import Pass, make_passes
from llm_finetune_kit.training.step import Objective
from sharing import BUDGET, behind, frozen_job

Forwards = dict[Any, Callable[..., Any]]


def put(forwards: Forwards, known: Forwards) -> None:
    """Have these modules use the forwards that were put on them, and all others of `known` their own."""
    for module in known:
        vars(module).pop("forward", None)
    for module, forward in forwards.items():
        module.forward = forward


def seconds_of(objective: Objective, work: Pass) -> float:
    began = time.perf_counter()
    objective.summed(work, 1.0 / work.targets).backward()
    return time.perf_counter() - began


def kept(objective: Objective, work: Pass) -> int:
    """Bytes that autograd keeps for the way back, weights left out."""
    tensors = (*objective.model.parameters(), *objective.model.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.summed(work)
    found = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    del loss
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frozen", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    job, objective = frozen_job(asked.frozen)
    together = {module: vars(module)["forward"] for module in objective.model.modules() if "forward" in vars(module)}
    ways: dict[str, Forwards] = {"by itself": {}, "together": together}
    batches = [behind(np.empty(0, int), job.pool[start : start + 4]) for start in range(0, 4 * asked.passes, 4)]
    passes = [work for batch in batches for work in make_passes(batch, range(len(batch)), BUDGET)]
    ratios = []
    for work in [passes[0], *passes * asked.rounds]:
        taken = {}
        for name in random.sample(list(ways), len(ways)):
            put(ways[name], together)
            taken[name] = seconds_of(objective, work)
        ratios.append(taken["by itself"] / taken["together"])
    ratios = ratios[1:]  # the first one warms up
    print(f"{len(ratios)} pairs: {statistics.median(ratios):.3f} times as fast together ({min(ratios):.2f} to {max(ratios):.2f})")
    largest = max(passes, key=lambda work: work.tokens)
    for name, forwards in ways.items():
        put(forwards, together)
        print(f"{name}: {kept(objective, largest) / 1e6:.1f} MB kept of {largest.tokens} tokens")


if __name__ == "__main__":
    main()
