"""Ways out for a run that does not fit: changes of its config, each planned again. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_finetune_kit.config import RunConfig

EDITS = 3  # ways out that are told


def edits(config: RunConfig, rows: int, *, narrow: bool, fits: Callable[[RunConfig], bool]) -> tuple[str, ...]:
    """Changes of the config that make it fit, each tried: alone where one is enough, else several together.

    `rows` is the length of the longest row in tokens, `narrow` says whether bfloat16 is computed natively, and `fits`
    plans a config again.
    """
    single: list[dict[str, Any]] = [
        {"training.gradient_checkpointing": True, "training.checkpoint_every": None},
        {"training.tokens_per_pass": 256},
        {"model.dtype": "bfloat16"} if narrow else {},
        {"training.optimizer": "adamw_8bit"},
        {"method": "lora", "training.freeze_layers": 0},
        {"model.quantization": "nf4"},
        {"model.max_length": max(8, rows // 2)},
        {"model.max_length": max(8, rows // 4)},
        {"lora.r": 8, "lora.alpha": 16, "lora.modules_to_save": None},
    ]
    pairs = [first | second for index, first in enumerate(single) for second in single[index + 1 :]]
    sums = [{knob: value for change in single[:end] for knob, value in change.items()} for end in range(3, len(single) + 1)]
    found: list[tuple[set[str], str]] = []
    for spare in (False, True):  # changes that hold one that suffices come last
        for values in [*single, *pairs, *sums]:
            told = _told(config, values)
            knobs = set(told.split(" and "))
            wanted = told and all(told != known for _, known in found) and any(less <= knobs for less, _ in found) == spare
            if wanted and len(found) < EDITS and fits(config.with_values(values)):
                found.append((knobs, told))
    return tuple(told for _, told in found)


def _told(config: RunConfig, values: dict[str, Any]) -> str:
    """The knobs that a change really changes, as one would type them."""
    before, after = config.model_dump(), config.with_values(values).model_dump()

    def at(tree: dict[str, Any], path: str) -> Any:
        for name in path.split("."):
            tree = tree[name]
        return tree

    changed = [path for path in values if at(before, path) != at(after, path)]
    return " and ".join(f"{path}={_typed(values[path])}" for path in changed)


def _typed(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
