"""What a run asks its model before and after training."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_finetune_kit.plan.speed import SAMPLES


def sample_prompts(material: Any) -> list[tuple[list[int], str, str]]:
    """Prompts of a `Material` to answer before and after training: ids, text and reference answer (may be empty)."""
    chat, asked = material.chat, material.plan.config.evaluation.prompts
    if asked:
        return [(chat.prompt_ids([{"role": "user", "content": text}]), text, "") for text in asked]
    tokens = material.shown
    found = []
    for index in range(min(SAMPLES, len(tokens))):
        ids, trained = tokens.example(index)
        first = int(np.flatnonzero(trained)[0])
        if first == 0:  # raw text: begin with its first words
            first = min(16, len(ids) // 2)
        last = first + int(np.argmin(np.append(trained[first:], False)))  # the end of the first answer
        asked, reference = ids[:first].tolist(), ids[first:last].tolist()
        found.append((asked, chat.decode(asked).strip(), chat.decode(reference).strip()))
    return found
