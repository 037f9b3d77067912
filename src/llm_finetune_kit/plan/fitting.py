"""The cheapest way to run that fits: which passes, which recomputation, which quantization. Pure.

Ways are tried from the fastest to the most frugal. None of them changes what a step means: the examples of a step stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llm_finetune_kit.plan.memory import Work, moments

AIM = 0.9  # share of the free memory that a choice of ours may take
SMALLEST_PASS = {"cpu": 256, "cuda": 1024, "mps": 512}  # tokens; smaller ones leave the device idle
STEPS = (0, 4, 3, 2, 1)  # recompute no block, every fourth, ... every one


@dataclass(frozen=True)
class Asked:
    """What the config leaves no choice about (None: free), and the longest row and all tokens of a step."""

    tokens: int | None
    best_tokens: int
    longest: int
    step_tokens: int
    recompute: int | None
    quantization: str | None
    may_quantize: bool
    optimizer: str | None


def widest(asked: Asked, budget: int) -> int:
    """Tokens of the largest pass under a budget: never less than the longest row, never more than a step has."""
    return max(asked.longest, min(budget, asked.step_tokens))


def ways(asked: Asked, work: Work) -> Iterator[tuple[int, Work]]:
    """Token budgets with the work they make, from the fastest to the most frugal."""
    packed: list[str | None] = [asked.quantization]
    if asked.quantization is None and asked.may_quantize:
        packed = [None, "nf4"]
    optimizers = [asked.optimizer or "adamw"]
    if asked.optimizer is None and work.full and work.device != "mps":
        optimizers.append("adamw_8bit")
    for optimizer in optimizers:
        for quantization in packed:
            for recompute in STEPS if asked.recompute is None else (asked.recompute,):
                for budget in _budgets(asked, work.device):
                    tokens = widest(asked, budget)
                    passes = max(1, -(-asked.step_tokens // tokens))
                    how = {"optimizer": optimizer, "quantization": quantization, "recompute": recompute}
                    yield budget, replace(work, tokens=tokens, passes=passes, **how)  # type: ignore[arg-type]


def _budgets(asked: Asked, device: str) -> list[int]:
    if asked.tokens is not None:
        return [asked.tokens]
    found = [asked.best_tokens]
    while found[-1] > max(SMALLEST_PASS[device], asked.longest):
        found.append(found[-1] // 2)
    return found


def needed_bytes(model: Any, work: Work) -> int:
    """Peak memory without the pages of mapped files, which the system takes back when it must."""
    return max(sum(size for part, size in parts.items() if part != "files") for parts in moments(model, work).values())


def first_that_fits(asked: Asked, work: Work, model: Any, free: int) -> tuple[int, Work]:
    """The first way within AIM of the free memory; else the first that fits at all; else the most frugal one."""
    tried = [(needed_bytes(model, way), budget, way) for budget, way in ways(asked, work)]
    for limit in (AIM * free, float(free)):
        for peak, budget, way in tried:
            if peak <= limit:
                return budget, way
    _, budget, way = min(tried, key=lambda found: found[0])
    return budget, way
