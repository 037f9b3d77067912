"""When the tokens of a batch came, and the way to end it early."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Asked by `generate` after every token: notes the time, tells `heard` the new ids, and stops all if `heard` says no."""

    def __init__(self, heard: Callable[[list[int]], bool] | None = None) -> None:
        self.heard = heard
        self.times: list[float] = []

    def start(self) -> None:
        """The prompts are about to be read."""
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        newest = input_ids[:, -1].tolist()  # waits until a GPU has really done the step
        self.times.append(time.perf_counter())
        done = self.heard is not None and not self.heard(newest)
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    @property
    def prefill(self) -> float:
        """Seconds from the start to the first token."""
        return self.times[1] - self.times[0]

    @property
    def decode(self) -> float:
        """Seconds from the first token to the last."""
        return self.times[-1] - self.times[1]
