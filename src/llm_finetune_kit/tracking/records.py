"""What trackers are told: events as numbers under stable names, knobs as hyperparameters, and nothing secret."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import RunConfig, knobs
from llm_finetune_kit.events import Evaluated, Event, Finished, Saved, Stepped

HERE_ONLY = ("output.output_dir", "model.cache_dir", "training.trackers")  # says nothing of the experiment
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters: shorter values are switches, and would be found in any text
HIDDEN = "(hidden)"


def numbers(event: Event) -> dict[str, float]:
    """The event's figures under their names; none for events without any. Losses are in nats per target token."""
    if isinstance(event, Stepped):
        return {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/gradient_norm": event.gradient_norm,
            "train/epoch": event.epoch,
            "train/tokens_per_second": event.tokens / max(event.seconds, 1e-9),
        }
    if isinstance(event, Evaluated):
        return {"eval/loss": event.loss, "eval/perplexity": event.perplexity}
    if isinstance(event, Saved) and event.folder.startswith("checkpoint"):
        return {"checkpoint/bytes": event.size_bytes, "checkpoint/seconds": event.seconds}
    if isinstance(event, Finished):
        return _figures(event.summary, "final")
    return {}


def _figures(tree: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Every number of a tree of values, named by its path."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _figures(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}/{name}"] = float(value)
    return found


def hyperparameters(config: RunConfig, asked: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Every knob that has a value, by its dotted path, and under `asked` the names of those in the user's own config.

    Lists are given as text, rows as their number, places as their last name.
    """
    found: dict[str, str | int | float | bool] = {"asked": ", ".join(path for path in knobs() if _value(asked, path) is not None)}
    tree = config.model_dump(mode="json")
    for path in knobs():
        value = _value(tree, path)
        if value is None or path in HERE_ONLY:
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = f"{len(value)} rows"
        elif isinstance(value, dict):
            value = json.dumps({_portable(name): share for name, share in value.items()}, ensure_ascii=False)
        elif isinstance(value, list):
            value = ", ".join(str(one) for one in value)
        found[path] = _portable(value) if isinstance(value, str) else value
    return found


def _value(tree: Any, path: str) -> Any:
    """What a tree holds at a dotted path; None where it ends before."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _portable(text: str) -> str:
    return Path(text).name if Path(text).is_absolute() else text


class Cleaner:
    """Takes out of texts what must not be stored: secrets of the environment, all that looks like one, the home folder."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        from llm_finetune_kit.data.quality.secrets import shapes

        secret = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET}
        self._secrets = sorted(secret, key=len, reverse=True)
        self._shapes = [pattern for _, pattern in shapes()]
        self._home = str(Path.home())

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for pattern in self._shapes:
            text = pattern.sub(HIDDEN, text)
        return text.replace(self._home, "~") if len(self._home) > 1 else text
