"""Answers from a model."""

from __future__ import annotations

from typing import Any

import torch

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.models.tokenizer import ChatTokenizer


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
