"""Liger's kernels in a model that trains, once a small pass has shown that they compute the same."""

from __future__ import annotations

from typing import Any

import torch

from llm_finetune_kit.models import liger
from llm_finetune_kit.training.step import Objective
from llm_finetune_kit.training.trial import no_trace, reason, small_pass

NARROW = 0.1  # of the result, which two ways of rounding to 16 bits keep within; a wrong kernel is farther off by far
EXACT = 1e-3  # in float32


def fuse(objective: Objective) -> str | None:
    """Have norms and rotary positions computed by Liger's kernels; why they are as before, or None where they are.

    Loss and gradient of a small pass are computed both ways, so that what is wrong or missing on this machine is found out
    before the first step. Evaluation and answers use the kernels too.
    """
    model, replaced = objective.model, []
    try:
        with no_trace(model):
            model.eval()  # without dropout, which has nothing to do with it
            before = _small_step(objective)
            replaced = liger.use_kernels(model, liger.load_kernels())
            fault = _fault(_small_step(objective), before, EXACT if objective.dtype is torch.float32 else NARROW)
    except Exception as error:  # triton, its compiler and the driver each raise their own
        liger.forget_kernels(replaced)
        return reason(error)
    if not replaced:
        return "this model has no norms or rotary positions that they compute"
    if fault is not None:
        liger.forget_kernels(replaced)
    return fault


def _small_step(objective: Objective) -> list[torch.Tensor]:
    """The loss of a small pass and its gradient by each weight that is trained."""
    objective.model.zero_grad(set_to_none=True)
    loss = objective.summed(small_pass())
    loss.backward()
    trained = (part for part in objective.model.parameters() if part.requires_grad)
    return [loss.detach(), *(torch.zeros_like(part) if part.grad is None else part.grad for part in trained)]


def _fault(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> str | None:
    """What is too far from what was expected, or None."""
    for name, part in (("loss", slice(1)), ("gradient", slice(1, None))):
        far = _apart(found[part], expected[part])
        if not far <= limit:  # NaN is
            return f"their {name} is {far:.1%} from what it was without them"
    return None


def _apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs: Any = zip(found, expected, strict=True)
    squares = [torch.stack([(a.float() - b.float()).square().sum(), b.float().square().sum()]) for a, b in pairs]
    difference, whole = torch.stack(squares).double().sum(0).sqrt().tolist()
    return float(difference / whole if difference else 0.0)
