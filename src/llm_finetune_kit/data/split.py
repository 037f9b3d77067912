"""Training and held-out examples that share no row and no near copy of one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import similar
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.prepare import Encoded


@dataclass(frozen=True)
class Split:
    """Training and held-out examples, where the held-out ones come from, and what copies were seen."""

    train: Tokens
    held_out: Tokens | None
    origin: str
    near_copies: int  # examples that nearly repeat an earlier one
    warnings: list[str] = field(default_factory=list)


def split(data: Encoded, settings: DataSection, seed: int, *, held_out: Encoded | None = None) -> Split:
    """Training and held-out examples that share no row and no near copy of one.

    With `held_out` these rows are held out, and training rows that nearly repeat one of them are told.
    Otherwise the share `validation_split` is taken, by default 5 % but at least 32 and at most 512 examples,
    and never more than a fifth; near copies of each other stay on one side.
    """
    chosen = np.random.Generator(np.random.PCG64([seed, 1 << 31])).permutation(len(data.tokens))
    if settings.max_samples is not None:
        chosen = chosen[: settings.max_samples]
    if held_out is not None:
        return _beside(data, np.sort(chosen), held_out)
    groups = similar.groups(data.sketches[chosen])
    copies = int(len(groups) - len(np.unique(groups)))
    share = settings.validation_split
    wanted = apart_of(len(chosen), share)
    out = _whole_groups(groups, min(round(wanted), len(chosen) - 1))
    if not out.any():
        return Split(data.tokens.select(np.sort(chosen)), None, _why_none(len(chosen), share, wanted), copies)
    train, taken = (data.tokens.select(np.sort(chosen[part])) for part in (~out, out))
    origin = f"{out.sum():,} of {len(chosen):,} examples, chosen by the seed; near copies of an example stay on its side"
    return Split(train, taken, origin + _too_few(len(taken)), copies)


def apart_of(count: int, share: float | None) -> float:
    """How many of `count` examples are to be held out: the share that is asked for, or what `split` takes by default."""
    return count * share if share is not None else min(512, max(0.05 * count, min(32, 0.2 * count)))


def _whole_groups(groups: np.ndarray, most: int) -> np.ndarray:
    """Which examples to hold out, bool [n]: whole groups in their order, each if there is still room for all of it."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    held: list[int] = []
    seen: set[int] = set()
    taken = 0
    for number in group.tolist():
        if number not in seen:
            seen.add(number)
            if taken + sizes[number] <= most:
                held.append(number)
                taken += int(sizes[number])
    marked: np.ndarray = np.isin(group, held)
    return marked


def _why_none(count: int, share: float | None, wanted: float) -> str:
    if share == 0:
        return "none: data.validation_split is 0"
    if count < 2:
        return "none: there is only one example, and it is needed for training"
    return f"none: {wanted:.1f} of {count} examples would be held out, or they are near copies of each other"


def _too_few(count: int) -> str:
    return "" if count >= 20 else f"; {count} are few, so the held-out loss is a rough guide"


def _beside(data: Encoded, chosen: np.ndarray, held_out: Encoded) -> Split:
    groups = similar.groups(np.concatenate([data.sketches[chosen], held_out.sketches]))
    train, apart = groups[: len(chosen)], groups[len(chosen) :]
    leaked = chosen[np.isin(train, apart)]
    warnings = []
    if len(leaked):
        shown = ", ".join(data.place(int(row)) for row in data.tokens.rows[leaked[:5]]) + (", ..." if len(leaked) > 5 else "")
        warnings.append(
            f"{len(leaked):,} training examples nearly repeat a held-out one ({shown}), so the held-out loss flatters; "
            "`finetune data check --eval --fix` writes a copy without them"
        )
    copies = int(len(train) - len(np.unique(train)))
    origin = str(held_out.report["name"]) + _too_few(len(held_out.tokens))
    return Split(data.tokens.select(chosen), held_out.tokens, origin, copies, warnings)
