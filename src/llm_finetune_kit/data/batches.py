"""Which examples make a step, and in what passes they are computed.

Examples per step are meaning: step k takes `order(seed, epoch)[k*E:(k+1)*E]`, whatever the hardware.
Passes are mechanics: the step's examples are packed into rows of at most `tokens_per_pass` tokens, in which
what prompts begin with alike may stand once (`data.prefixes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.prefixes import Part, parts_of, shared_groups

SHARING = 256  # rows of an evaluation among which shared beginnings are looked for


def order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch (counted from 0), int64 [examples]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)


def steps_per_epoch(examples: int, per_step: int) -> int:
    """Optimizer steps that see every example once; the last one may be smaller."""
    return -(-examples // per_step)


def step_examples(examples: int, per_step: int, seed: int, step: int) -> np.ndarray:
    """The examples of a step (counted from 0): a function of its arguments alone, so a resume needs no state."""
    epoch, position = divmod(step, steps_per_epoch(examples, per_step))
    return order(examples, seed, epoch)[position * per_step : (position + 1) * per_step]


def step_tokens(train: Any, per_step: int, seed: int, step: int) -> Tokens:
    """The examples of a step (counted from 0) of `Tokens` in memory or of a `streaming.Stream`."""
    if isinstance(train, Tokens):
        return train.select(step_examples(len(train), per_step, seed, step))
    found: Tokens = train.take(per_step, seed, step)
    return found


@dataclass(frozen=True)
class Pass:
    """One row of packed documents. A document's input is its example up to the last token but one that is learned.

    Without `parents` each part of the row is a document. With them a part goes on where its parent ends, and the
    documents are the parts that have targets.
    """

    input_ids: torch.Tensor  # int64 [1, tokens]
    position_ids: torch.Tensor  # int64 [1, tokens], restarting at 0 with each document
    keep: torch.Tensor  # bool [1, tokens]: positions whose next token is a target
    labels: torch.Tensor  # int64 [targets]: those next tokens
    lengths: tuple[int, ...]  # tokens of each part
    parents: tuple[int, ...] | None = None  # of each part: the index of the one it goes on from, or -1
    shared: int = 0  # tokens of documents that need not be computed, as they are in a parent

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return self.input_ids.shape[1]

    @property
    def targets(self) -> int:
        return self.labels.shape[0]

    @property
    def rows(self) -> torch.Tensor:
        """The kept positions by number, int64 [targets]: a GPU would have to be waited for to count a mask."""
        return self.keep[0].nonzero()[:, 0]

    def documents(self) -> Iterator[Pass]:
        """Each document as a pass of its own, where the parts are documents."""
        begin = targets = 0
        for length in self.lengths:
            span = (slice(None), slice(begin, begin + length))
            keep = self.keep[span]
            count = int(keep.sum())
            yield Pass(self.input_ids[span], self.position_ids[span], keep, self.labels[targets : targets + count], (length,))
            begin, targets = begin + length, targets + count


def arrange(lengths: Sequence[int], budget: int, *, packing: bool = True) -> list[list[int]]:
    """Indices of the lengths, grouped so that each group's sum stays within the budget (first fit, longest first).

    A length above the budget makes a group of its own; without packing every length does.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((g for g, free in enumerate(room) if packing and free >= lengths[index]), None)
        if fitting is None:
            groups.append([index])
            room.append(budget - lengths[index])
        else:
            groups[fitting].append(index)
            room[fitting] -= lengths[index]
    return groups


def make_passes(
    tokens: Tokens, examples: Sequence[int] | np.ndarray, budget: int, *, packing: bool = True, sharing: int | None = None
) -> list[Pass]:
    """The passes that compute these examples; examples without a target take no part.

    With `sharing` what prompts of a pass begin with alike is computed once where that saves so many tokens, if passes are packed.
    """
    documents = [document for index in examples if (document := _document(tokens, int(index))) is not None]
    sharing = sharing if packing else None
    ids = [ids for ids, _, _ in documents]
    groups = shared_groups(ids, _prompts(documents), budget, sharing) if sharing else None
    if groups is None:
        groups = arrange([len(document) for document in ids], budget, packing=packing)
    return [_pack([documents[index] for index in group], sharing=sharing) for group in groups]


def _document(tokens: Tokens, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    ids, trained = tokens.example(index)
    learned = np.flatnonzero(trained[1:])  # position t predicts token t + 1
    if len(learned) == 0:
        return None
    length = int(learned[-1]) + 1
    keep = trained[1 : length + 1]
    return ids[:length], keep, ids[1 : length + 1][keep]


def _prompts(documents: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[int]:
    """Tokens of each document before the first that predicts a target."""
    return [int(keep.argmax()) for _, keep, _ in documents]


def _pack(documents: list[tuple[np.ndarray, np.ndarray, np.ndarray]], *, sharing: int | None = None) -> Pass:
    lengths = [len(ids) for ids, _, _ in documents]
    parts = parts_of([ids for ids, _, _ in documents], _prompts(documents), sharing) if sharing else []
    branched = len(parts) > len(documents)
    if not branched:
        parts = [Part(index, 0, length) for index, length in enumerate(lengths)]
    ids, keep = (np.concatenate([documents[part.document][kind][part.begin : part.end] for part in parts]) for kind in (0, 1))
    labels = np.concatenate([documents[part.document][2] for part in parts if part.end == lengths[part.document]])
    return Pass(
        torch.from_numpy(ids.astype(np.int64))[None],
        torch.from_numpy(np.concatenate([np.arange(part.begin, part.end) for part in parts]))[None],
        torch.from_numpy(keep)[None],
        torch.from_numpy(labels.astype(np.int64)),
        tuple(part.end - part.begin for part in parts),
        tuple(part.parent for part in parts) if branched else None,
        shared=sum(lengths) - len(ids),
    )


def evaluation_passes(tokens: Tokens, budget: int, *, packing: bool = True, sharing: int | None = None) -> Iterator[Pass]:
    """Every example once, in passes within the budget, made as they are asked for."""
    if packing and sharing:
        for start in range(0, len(tokens), SHARING):
            yield from make_passes(tokens, range(start, min(start + SHARING, len(tokens))), budget, sharing=sharing)
        return
    for group in arrange([int(length) for length in tokens.lengths], budget, packing=packing):
        yield from make_passes(tokens, group, 2 * budget, packing=packing)


def example_passes(tokens: Tokens, budget: int, *, packing: bool = True) -> Iterator[tuple[Pass, list[int]]]:
    """Every example that has a target once, in passes within the budget, each with the examples of its documents."""
    for group in arrange([int(length) for length in tokens.lengths], budget, packing=packing):
        documents = [(index, document) for index in group if (document := _document(tokens, index)) is not None]
        if documents:
            yield _pack([document for _, document in documents]), [index for index, _ in documents]
