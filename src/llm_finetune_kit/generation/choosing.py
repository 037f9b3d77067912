"""Which token comes next: repetition penalty, temperature, top-k and top-p, and a draw that belongs to its prompt.

A draw from softmax(scores) is the largest of scores + Gumbel noise. With a source of noise for every prompt, `generate`
can take the largest as in greedy search, and a prompt's answer does not depend on what else is in its batch.
"""

from __future__ import annotations

import hashlib

import torch
from transformers import LogitsProcessor

from llm_finetune_kit.config import GenerationSection


def prompt_seed(seed: int, ids: list[int]) -> int:
    """A seed for the random numbers of one prompt: a function of the seed and the prompt."""
    return int.from_bytes(hashlib.sha256(repr((seed, ids)).encode()).digest()[:7], "big")


class Chooser(LogitsProcessor):  # type: ignore[misc]
    """Scores [rows, vocabulary] of the next token, changed so that the largest is the one to take.

    `pads` says how many ids on the left of each prompt are padding, which must not count as repeated. `seeds` has one
    seed per prompt, or is None where the caller draws.
    """

    def __init__(self, how: GenerationSection, pads: list[int], seeds: list[int] | None) -> None:
        self.how = how
        self.pads = pads
        draws = how.temperature > 0 and seeds is not None
        self.sources = [torch.Generator().manual_seed(seed) for seed in seeds or []] if draws else []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        if self.how.repetition_penalty != 1.0:
            scores = self._less_repetitive(input_ids, scores)
        if self.how.temperature > 0:
            scores = _likeliest(scores / self.how.temperature, self.how.top_k, self.how.top_p)
        if self.sources:
            scores = scores + self._noise(scores)
        return scores

    def _less_repetitive(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Tokens of the prompt and the answer so far become less likely (Keskar et al. 2019): s / p, or s * p below 0."""
        seen = input_ids.clone()
        copies = len(input_ids) // len(self.pads)  # beams of one prompt stand together
        for number, pad in enumerate(self.pads):
            rows = slice(number * copies, (number + 1) * copies)
            seen[rows, :pad] = seen[rows, pad : pad + 1]  # a token that is there anyway
        found = scores.gather(1, seen)
        penalty = self.how.repetition_penalty
        return scores.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))

    def _noise(self, scores: torch.Tensor) -> torch.Tensor:
        """Gumbel noise [rows, vocabulary], each row from its own source."""
        drawn = [torch.empty(scores.shape[1]).exponential_(generator=source) for source in self.sources]
        return -torch.stack(drawn).log().to(scores.device)


def _likeliest(scores: torch.Tensor, top_k: int | None, top_p: float) -> torch.Tensor:
    """The scores with all but the `top_k` likeliest, and of these all beyond the share `top_p`, at minus infinity."""
    if top_k is not None and top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, places = scores.sort(descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= top_p  # the likeliest one always stays
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, places, beyond), -torch.inf)
    return scores
