"""Answers from a model: many prompts at once, or one piece by piece.

transformers' `generate` does the decoding. What it leaves to its callers is here: padding on the left, settings that
come from nowhere but the config, random numbers that belong to a prompt and not to its batch, and a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.generation.choosing import Chooser, prompt_seed
from llm_finetune_kit.generation.clock import Clock
from llm_finetune_kit.models.tokenizer import ChatTokenizer

MOST_ROWS = 64  # prompts decoded at once: more gain little where a matrix product is busy already
CACHE_BYTES = 1 << 30  # of keys and values held for one batch
CACHE_ITEM = 4  # bytes of one of them, at most


@dataclass(frozen=True)
class Answer:
    """What a model said: its text, its length in tokens, and whether it ended by itself or was cut off."""

    text: str
    tokens: int
    stopped: bool


@dataclass
class Speed:
    """What answering took: reading the prompts up to the first new token (prefill), and every token after it (decode)."""

    prompt_tokens: int = 0
    decoded_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)  # seconds to the first token of each batch

    def add(self, clock: Clock, prompt_tokens: int, decoded_tokens: int) -> None:
        """Count one batch. Padding and what follows an end are no tokens, though they took time."""
        self.prompt_tokens += prompt_tokens
        self.decoded_tokens += decoded_tokens
        self.prefill_seconds += clock.prefill
        self.decode_seconds += clock.decode
        self.first_token.append(clock.prefill)


def answer(model: Any, chat: ChatTokenizer, prompt_ids: list[int], how: GenerationSection, *, seed: int = 0) -> str:
    """The model's continuation of one rendered prompt; see `answers`."""
    return answers(model, chat, [prompt_ids], how, seed=seed)[0].text


def answers(
    model: Any,
    chat: ChatTokenizer,
    prompts: list[list[int]],
    how: GenerationSection,
    *,
    seed: int = 0,
    speed: Speed | None = None,
    heard: Callable[[list[int]], bool] | None = None,
) -> list[Answer]:
    """The model's continuation of each rendered prompt, up to its end or `max_new_tokens`, in the prompts' order.

    A prompt's answer depends on the seed and on the prompt, not on its neighbours, to the rounding of the number
    format. A prompt that leaves no room for an answer loses its beginning. The global random state and the model's
    mode are left as they were. `heard` is told the new ids of a batch after every token (see `Clock`).
    """
    found: list[Answer | None] = [None] * len(prompts)
    fitting = fitted(model, prompts, how)
    for batch in _batches(model, [len(ids) for ids in fitting], how):
        rows = [fitting[index] for index in batch]
        clock = Clock(heard)
        said = continued(model, chat, rows, how, seed=seed, clock=clock)
        for index, one in zip(batch, said, strict=True):
            found[index] = one
        if speed is not None:
            speed.add(clock, sum(map(len, rows)), sum(max(0, one.tokens - 1) for one in said))
    return [one for one in found if one is not None]


def fitted(model: Any, prompts: list[list[int]], how: GenerationSection) -> list[list[int]]:
    """The prompts, each with room for an answer after it: a longer one loses its beginning."""
    room = positions(model) - _new_tokens(model, how)
    return [ids[-room:] for ids in prompts]


@torch.inference_mode()
def continued(
    model: Any,
    chat: ChatTokenizer,
    rows: list[list[int]],
    how: GenerationSection,
    *,
    seed: int,
    clock: Clock,
    stops: list[int] | None = None,
) -> list[Answer]:
    """The continuations of one batch of prompts that fit, up to one of `stops` (default: `stop_ids`)."""
    base = _inner(model)
    stops = stop_ids(base, chat) if stops is None else stops
    ids, mask = _padded(rows, chat.pad_id, next(base.parameters()).device)
    sampled = how.temperature > 0
    drawn_by_beams = sampled and how.num_beams > 1  # transformers draws these, so every prompt is a batch of its own
    was_training = model.training
    model.eval()
    seeds = [prompt_seed(seed, row) for row in rows]
    pads = [ids.shape[1] - len(row) for row in rows]
    with _settings_of_nobody(base, stops, chat.pad_id), torch.random.fork_rng():
        torch.manual_seed(seeds[0])
        clock.start()
        out = base.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_settings(how, _new_tokens(base, how), stops, chat.pad_id, draw=drawn_by_beams),
            logits_processor=LogitsProcessorList([Chooser(how, pads, None if drawn_by_beams else seeds)]),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    model.train(was_training)
    return [_answer(chat, row, stops) for row in out[:, ids.shape[1] :].tolist()]


def stop_ids(model: Any, chat: ChatTokenizer) -> list[int]:
    """The tokens that end an answer: the template's end of turn, the end of text, and what the model's files name."""
    named = _inner(model).generation_config.eos_token_id
    return sorted({*chat.stop_ids(), *(named if isinstance(named, list) else [named] if named is not None else [])})


def _answer(chat: ChatTokenizer, new: list[int], stops: list[int]) -> Answer:
    end = next((place for place, index in enumerate(new) if index in stops), None)
    own = new if end is None else new[:end]
    return Answer(chat.decode(own).strip(), len(own) + (end is not None), end is not None)


def _padded(rows: list[list[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 [rows, longest]: padded on the left, so that every row goes on at the same place."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _settings(how: GenerationSection, new_tokens: int, stops: list[int], pad_id: int, *, draw: bool) -> Any:
    """What `generate` itself decides by; `Chooser` does the rest."""
    drawing = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if draw else {}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        num_beams=how.num_beams,
        do_sample=draw,
        eos_token_id=stops or None,
        pad_token_id=pad_id,
        **drawing,
    )


@contextmanager
def _settings_of_nobody(model: Any, stops: list[int], pad_id: int) -> Iterator[None]:
    """Keep out what a model's generation_config.json would add (penalties, sampling): nobody asked for it here."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=pad_id)
    try:
        yield
    finally:
        model.generation_config = own


def _inner(model: Any) -> Any:
    """transformers' model inside an adapter's; the adapter sits in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _batches(model: Any, lengths: list[int], how: GenerationSection) -> Iterator[list[int]]:
    """Indices of prompts, those of like length together, as many at once as the cache may hold."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    alone = how.temperature > 0 and how.num_beams > 1
    while order:
        token = _cache_bytes(model) * (lengths[order[-1]] + _new_tokens(model, how)) * how.num_beams
        count = 1 if alone else max(1, min(MOST_ROWS, CACHE_BYTES // token))
        yield order[-count:]
        del order[-count:]


def _cache_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token, at most."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * CACHE_ITEM)


def _new_tokens(model: Any, how: GenerationSection) -> int:
    return min(how.max_new_tokens, positions(model) - 1)


def positions(model: Any) -> int:
    """How many tokens the model can read and write in all."""
    return int(getattr(model.config, "max_position_embeddings", 2048))
