"""How fast a model reads prompts and writes answers, each by itself."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.generation import continued
from llm_finetune_kit.generation.clock import Clock
from llm_finetune_kit.opening import Opened


def measured_speed(opened: Opened, *, prompt_tokens: int, new_tokens: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Tokens per second, the median of `repeats` after one that does not count.

    prefill: tokens of all prompts until their first new token is there. decode: every token after the first one, of all
    rows together. The prompts are random ids, and no answer ends before `new_tokens`.
    """
    source = torch.Generator().manual_seed(0)
    vocabulary = opened.model.get_input_embeddings().weight.shape[0]
    rows = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=source).tolist()
    how = GenerationSection(max_new_tokens=new_tokens)
    clocks = []
    for _ in range(repeats + 1):
        clock = Clock()
        with opened.objective.precision():
            continued(opened.model, opened.chat, rows, how, seed=0, clock=clock, stops=[])
        clocks.append(clock)
    prefill, decode = (median(getattr(clock, part) for clock in clocks[1:]) for part in ("prefill", "decode"))
    return {
        "prefill_tokens_per_second": batch_size * prompt_tokens / prefill,
        "decode_tokens_per_second": batch_size * (new_tokens - 1) / decode if new_tokens > 1 else None,
        "seconds_to_first_token": prefill,
        "seconds_per_token": decode / (new_tokens - 1) if new_tokens > 1 else None,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "device": str(opened.objective.device),
        "dtype": str(opened.objective.dtype).removeprefix("torch."),
    }
