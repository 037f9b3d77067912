"""Perplexity and bits per byte of a model on rows, and of its base where it is an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import prepare
from llm_finetune_kit.data.batches import evaluation_passes
from llm_finetune_kit.data.gate import gate
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.windows import windowed
from llm_finetune_kit.evaluation.losses import TOKENS_PER_PASS, example_bytes
from llm_finetune_kit.generation import positions
from llm_finetune_kit.hardware import this_machine
from llm_finetune_kit.models.adapters import without_adapter
from llm_finetune_kit.opening import Opened, open_model
from llm_finetune_kit.training.step import Objective, mean_loss


def measure(
    model: str, data: Any, *, max_length: int | None = None, dtype: str | None = None, settings: DataSection | None = None
) -> dict[str, dict[str, float]]:
    """Figures of the model on the data's answers, and under the key `base` those of its base model.

    Each holds loss (nats per target token), perplexity (its exponential), bits_per_byte (loss over the bytes
    of the target text, comparable between tokenizers), rows, target_tokens and left_out: rows whose prompts alone are
    longer than the model reads.
    """
    settings = settings or DataSection()
    read = prepare.read(data, settings)
    machine = this_machine(Path("."))
    opened = open_model(model, dtype=dtype or ("bfloat16" if machine.bfloat16 else "float32"), device=machine.device)
    rows = rows_for(opened, read, settings, max_length=max_length)
    if not opened.is_adapter:
        return {"model": _with(rows, figures(opened.objective, rows.tokens, opened.chat))}
    with without_adapter(opened.model):
        base = figures(opened.objective, rows.tokens, opened.chat)
    tuned = figures(opened.objective, rows.tokens, opened.chat)
    return {"base": _with(rows, base), "tuned": _with(rows, tuned)}


@dataclass(frozen=True)
class Rows:
    """Rows as a model reads them; `place` names one as a person finds it."""

    tokens: Tokens
    place: Callable[[int], str]
    left_out: int  # rows of whose answers the model would see nothing


def _with(rows: Rows, found: dict[str, float]) -> dict[str, float]:
    return found | {"left_out": rows.left_out}


def rows_for(opened: Opened, read: prepare.Read, settings: DataSection, *, max_length: int | None = None) -> Rows:
    """Rows under a model's tokenizer and template, cut to what it can read, and let through the gate.

    Rows whose prompts alone are longer than that are left out: nothing of their answers could be measured.
    """
    encoded = prepare.tokenize(read, settings, opened.chat, opened.chat.fingerprint())
    length = int(max_length or positions(opened.model))
    if encoded.report["format"] == "text":
        encoded = windowed(encoded, length, opened.chat)
    kind = encoded.report["format"]
    how = {"texts": kind in ("text", "tokens"), "own_masks": kind == "tokens"}
    limit = positions(opened.model)
    settings = settings.model_copy(update={"on_bad_rows": "drop"})
    tokens, _, _ = gate(encoded.tokens, opened.chat, settings, read.name, length, place=encoded.place, limit=limit, **how)
    return Rows(tokens, encoded.place, len(encoded.tokens) - len(tokens))


def figures(objective: Objective, tokens: Tokens, chat: Any) -> dict[str, float]:
    """Loss, perplexity, bits per byte, rows and target tokens of a model on rows."""
    loss, targets = mean_loss(objective, evaluation_passes(tokens, TOKENS_PER_PASS))
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * targets / math.log(2) / max(1, target_bytes(tokens, chat)),
        "rows": len(tokens),
        "target_tokens": targets,
    }


def target_bytes(tokens: Tokens, chat: Any) -> int:
    """UTF-8 bytes of the text that the target tokens stand for; special tokens count nothing."""
    return sum(example_bytes(tokens, chat, index) for index in range(len(tokens)))
