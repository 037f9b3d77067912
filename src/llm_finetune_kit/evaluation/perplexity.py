"""Perplexity and bits per byte of a model on rows, and of its base where it is an adapter."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from llm_finetune_kit.config import DataSection
from llm_finetune_kit.data import prepare
from llm_finetune_kit.data.batches import evaluation_passes
from llm_finetune_kit.data.gate import gate
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.windows import windowed
from llm_finetune_kit.hardware import this_machine
from llm_finetune_kit.models.adapters import without_adapter
from llm_finetune_kit.opening import open_model
from llm_finetune_kit.training.step import mean_loss

TOKENS_PER_PASS = 2048


def measure(
    model: str, data: Any, *, max_length: int | None = None, dtype: str | None = None, settings: DataSection | None = None
) -> dict[str, dict[str, float]]:
    """Figures of the model on the data's answers, and under the key `base` those of its base model.

    Each holds loss (nats per target token), perplexity (its exponential), bits_per_byte (loss over the bytes
    of the target text, comparable between tokenizers), rows and target_tokens.
    """
    settings = settings or DataSection()
    read = prepare.read(data, settings)
    machine = this_machine(Path("."))
    opened = open_model(model, dtype=dtype or ("bfloat16" if machine.bfloat16 else "float32"), device=machine.device)
    encoded = prepare.tokenize(read, settings, opened.chat, opened.chat.fingerprint())
    limit: Any = getattr(opened.model.config, "max_position_embeddings", 2048)
    length = int(max_length or limit)
    if encoded.report["format"] == "text":
        encoded = windowed(encoded, length, opened.chat)
    kind = encoded.report["format"]
    how = {"texts": kind in ("text", "tokens"), "own_masks": kind == "tokens"}
    tokens, facts, _ = gate(encoded.tokens, opened.chat, settings, read.name, length, place=encoded.place, **how)
    size = target_bytes(tokens, opened.chat)
    found = {}
    for name, switch in (("base", partial(without_adapter, opened.model) if opened.is_adapter else None), ("tuned", nullcontext)):
        if switch is None:
            continue
        with switch():
            loss, targets = mean_loss(opened.objective, evaluation_passes(tokens, TOKENS_PER_PASS))
        found[name if opened.is_adapter else "model"] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss * targets / math.log(2) / max(1, size),
            "rows": facts.examples,
            "target_tokens": targets,
        }
    return found


def target_bytes(tokens: Tokens, chat: Any) -> int:
    """UTF-8 bytes of the text that the target tokens stand for; special tokens count nothing."""
    total = 0
    for index in range(len(tokens)):
        ids, trained = tokens.example(index)
        total += len(chat.decode(ids[trained].tolist()).encode("utf-8"))
    return total
