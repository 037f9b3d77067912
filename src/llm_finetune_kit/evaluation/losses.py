"""The loss of a model on every row by itself, computed in packed passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_finetune_kit.data.batches import example_passes
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.training.step import Objective

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class RowLosses:
    """For each row: its number, the summed loss in nats (float64), its target tokens, and the bytes of their text."""

    rows: np.ndarray
    loss: np.ndarray
    targets: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def sums(self, size: np.ndarray, unit: float = 1.0) -> np.ndarray:
        """What adds up over rows [rows, 2]: loss in `unit`s of nats, and the size of a row (tokens or bytes)."""
        return np.stack([self.loss / unit, size], axis=1)

    def at(self, rows: list[int]) -> RowLosses:
        """Those rows, in this order."""
        place = {int(row): index for index, row in enumerate(self.rows)}
        found = np.array([place[row] for row in rows], dtype=np.int64)
        return RowLosses(self.rows[found], self.loss[found], self.targets[found], self.bytes[found])


@torch.no_grad()
def row_losses(
    objective: Objective, tokens: Tokens, chat: Any, *, budget: int = TOKENS_PER_PASS, packing: bool = True
) -> RowLosses:
    """Losses of all examples; several of one row (windows of a long text) count as one. Rows without a target are left out.

    The model is in eval mode while it is measured, and as it was afterwards.
    """
    was_training = objective.model.training
    objective.model.eval()
    loss = np.zeros(len(tokens))
    for work, examples in example_passes(tokens, budget, packing=packing):
        loss[examples] = objective.by_document(work).double().cpu().numpy()
    objective.model.train(was_training)
    rows, where = np.unique(tokens.rows, return_inverse=True)
    sizes = np.array([example_bytes(tokens, chat, index) for index in range(len(tokens))])
    sums = [np.bincount(where, weights=part, minlength=len(rows)) for part in (loss, tokens.targets, sizes)]
    kept = sums[1] > 0
    return RowLosses(rows[kept], *(part[kept] for part in sums))


def example_bytes(tokens: Tokens, chat: Any, index: int) -> int:
    """UTF-8 bytes of the text that an example's target tokens stand for; special tokens count nothing."""
    ids, trained = tokens.example(index)
    return len(chat.decode(ids[trained].tolist()).encode("utf-8"))
