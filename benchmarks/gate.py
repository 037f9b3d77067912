"""The equality gate: a contender's speed counts only if it did the same training as the float32 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FIRST_LOSS_LIMIT = {"float32": 1e-3, "bfloat16": 5e-3}  # absolute, at a loss of about 11
COSINE_LIMIT = {"float32": 0.99, "bfloat16": 0.95}
NORM_LIMIT = 0.05  # relative, of the update: Adam makes it follow the learning rate and the number of steps
LATER_LOSS_LIMIT = 0.01  # relative, at every step


@dataclass(frozen=True)
class Verdict:
    """What the gate measured, and why a contender failed it (nothing means it passed)."""

    first_loss_error: float
    worst_loss_error: float
    cosine: float
    norm_ratio: float
    faults: list[str] = field(default_factory=list)


def judge(run: dict[str, Any], reference: dict[str, Any], precision: str, initial: Path) -> Verdict:
    """Compare one run with the reference on the same documents.

    Both are result.json contents with "adapter", the path of the adapter saved after the warm-up.
    """
    first = abs(run["losses"][0] - reference["losses"][0])
    worst = max(abs(a - b) / b for a, b in zip(run["losses"], reference["losses"], strict=True))
    update, expected = (flat_update(Path(result["adapter"]), initial) for result in (run, reference))
    cosine = cosine_of(update, expected)
    norm = float(np.linalg.norm(update) / np.linalg.norm(expected))
    faults = []
    if update.shape != expected.shape:
        faults.append("its adapter does not have the reference's tensors")
    if not first <= FIRST_LOSS_LIMIT[precision]:
        faults.append(f"first loss off by {first:.1e}, limit {FIRST_LOSS_LIMIT[precision]:.0e}")
    if not worst <= LATER_LOSS_LIMIT:
        faults.append(f"a later loss off by {worst:.1%}, limit {LATER_LOSS_LIMIT:.0%}")
    if not norm > 0:
        faults.append("the adapter did not change: nothing was trained")
    elif not cosine >= COSINE_LIMIT[precision]:
        faults.append(f"update has cosine {cosine:.3f} with the reference, limit {COSINE_LIMIT[precision]}")
    elif not abs(norm - 1) <= NORM_LIMIT:
        faults.append(f"update is {norm:.2f} times as long as the reference, limit {NORM_LIMIT:.0%}")
    return Verdict(first, worst, cosine, norm, faults)


def flat_update(adapter: Path, initial: Path) -> np.ndarray:
    """Every LoRA weight's change since the start, in one vector."""
    before, after = load_file(initial), load_file(adapter)
    changes = [(after[k].astype(np.float64) - before[k]).ravel() for k in sorted(before.keys() & after.keys())]
    return np.concatenate(changes) if changes else np.zeros(0)


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 and a.shape == b.shape else 0.0
