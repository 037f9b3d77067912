"""Loss scaling for float16, whose smallest numbers are larger than many gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llm_finetune_kit.errors import TrainingError

GROWS_AFTER = 2000  # steps in a row without an overflow
HIGHEST = 2.0**24


@dataclass
class LossScale:
    """The factor that the loss is multiplied by, so that small gradients stay above float16's smallest number.

    It doubles after GROWS_AFTER good steps and halves where a gradient overflows. A step that overflowed is then
    computed again: the optimizer has not moved, no example is lost and no step is counted twice.
    """

    scale: float = 2.0**16
    good: int = 0

    def unscale(self, parameters: Iterable[torch.Tensor]) -> None:
        """Divide the gradients by the scale, in place; an overflow stays inf or NaN."""
        torch._foreach_mul_([part.grad for part in parameters if part.grad is not None], 1.0 / self.scale)

    def grow(self) -> None:
        """After a step that went well."""
        self.good += 1
        if self.good >= GROWS_AFTER:
            self.scale, self.good = min(2 * self.scale, HIGHEST), 0

    def shrink(self) -> None:
        """After an overflow. Raises TrainingError where no scale would help."""
        self.scale, self.good = self.scale / 2, 0
        if self.scale < 1:
            raise TrainingError(
                60,
                "the gradients overflow float16 even where they are not scaled up",
                why="the optimizer was stopped before it moved, so the weights are those of the last step",
                fix="lower training.learning_rate, or set model.dtype=float32",
            )
