"""AdamW over the trained weights, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def make_optimizer(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (betas 0.9 and 0.999, epsilon 1e-8); matrices decay, biases and norms do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


def learning_rates(schedule: str, steps: int, peak: float, warmup: int) -> list[float]:
    """The learning rate of every step, as a list to print, plot and test.

    It rises linearly over `warmup` steps (the first step already learns), then follows the schedule: half a
    cosine or a line from the peak down to 0, or stays constant.
    """
    shapes = {
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "linear": lambda done: 1 - done,
        "constant": lambda done: 1.0,
    }
    shape = shapes[schedule]
    rest = max(1, steps - warmup)
    return [peak * ((step + 1) / warmup if step < warmup else shape((step - warmup) / rest)) for step in range(steps)]
