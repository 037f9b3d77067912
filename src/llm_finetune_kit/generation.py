"""Answers from a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.models.tokenizer import ChatTokenizer
from llm_finetune_kit.plan.speed import SAMPLES


@torch.inference_mode()
def answer(model: Any, chat: ChatTokenizer, prompt_ids: list[int], how: GenerationSection, *, seed: int = 0) -> str:
    """The model's continuation of a rendered prompt, up to its end of turn or `max_new_tokens`.

    The same seed gives the same answer; the global random state is left as it was.
    """
    was_training = model.training
    model.eval()
    room = max(1, _positions(model) - how.max_new_tokens)
    ids = torch.tensor([prompt_ids[-room:]], device=next(model.parameters()).device)
    sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature > 0 else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=how.max_new_tokens,
            num_beams=how.num_beams,
            do_sample=how.temperature > 0,
            eos_token_id=chat.stop_ids(),
            pad_token_id=chat.pad_id,
            **sampling,
        )
    model.train(was_training)
    return chat.decode(out[0, ids.shape[1] :].tolist()).strip()


def _positions(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", 2048))


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
