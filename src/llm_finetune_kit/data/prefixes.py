"""What several documents of a pass begin with alike, so that it is computed once.

Rows of one data set often begin with the same words: a system prompt, a list of tools, "Below is an instruction". Under causal
attention the states of those tokens are the same in each document, and the gradient that reaches them is the sum of what each
document sends back. So a pass may be a tree: parts, each of which goes on where another one ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np

LEAST = 8  # tokens that must be saved at least
PART = 70_000_000  # weights of a layer times tokens, which a part costs it: saving 12, GPT-2 gains and the demo model loses
MUCH = 0.05  # of all tokens, from which on passes are filled by what is shared
OVER = -1  # stands where a prompt has no more tokens


@dataclass(frozen=True)
class Part:
    """Tokens `begin` to `end` of a document. Those before are in the part at index `parent`, or there are none (-1)."""

    document: int
    begin: int
    end: int
    parent: int = -1


@dataclass
class Tree:
    """Grows the parts of documents; `prompts` are the tokens that each may share, `worth` those that a shared part must save."""

    ids: Sequence[np.ndarray]
    prompts: Sequence[int]
    worth: int
    parts: list[Part] = field(default_factory=list)

    def grow(self, group: list[int], begin: int = 0, parent: int = -1) -> None:
        """Add the parts of a sorted `group`, whose first `begin` tokens are in `parent` and its ancestors."""
        alike = self.alike(group[0], group[-1]) if len(group) > 1 else 0
        if (alike - begin) * (len(group) - 1) >= self.worth:
            self.parts.append(Part(group[0], begin, alike, parent))
            begin, parent = alike, len(self.parts) - 1
        for token, branch in groupby(group, key=lambda document: self._token(document, alike)):
            documents = list(branch)
            if token != OVER and len(documents) > 1:
                self.grow(documents, begin, parent)
            else:
                self.parts += [Part(document, begin, len(self.ids[document]), parent) for document in documents]

    def _token(self, document: int, place: int) -> int:
        return int(self.ids[document][place]) if place < self.prompts[document] else OVER

    def alike(self, first: int, last: int) -> int:
        """Tokens that the prompts of two documents begin with alike."""
        most = min(self.prompts[first], self.prompts[last])
        differs = np.flatnonzero(self.ids[first][:most] != self.ids[last][:most])
        return int(differs[0]) if len(differs) else most


def worth_sharing(weights: int) -> int:
    """Tokens that a shared part must save in a model with so many weights in a layer (0 where that is not known)."""
    return max(LEAST, -(-PART // max(1, weights)))


def parts_of(ids: Sequence[np.ndarray], prompts: Sequence[int], worth: int) -> list[Part]:
    """Parts that make up the documents, each behind its parent; of a document only the first `prompts` tokens can be shared.

    The last part of a document is its own alone.
    """
    grown = Tree(ids, prompts, worth)
    grown.grow(in_order(ids, prompts))
    return grown.parts


def in_order(ids: Sequence[np.ndarray], prompts: Sequence[int]) -> list[int]:
    """The documents by their prompts, so that those which begin most alike stand together."""
    return sorted(range(len(ids)), key=lambda index: ids[index][: prompts[index]].tolist())


def shared_groups(ids: Sequence[np.ndarray], prompts: Sequence[int], budget: int, worth: int) -> list[list[int]] | None:
    """Documents that together, beginnings counted once, stay within `budget`; None where there is little to share."""
    order, tree = in_order(ids, prompts), Tree(ids, prompts, worth)
    alike = [0, *(max(0, tree.alike(*pair) - worth + 1) for pair in pairwise(order))]  # the least that is shared in the end
    if not ids or sum(alike) < MUCH * sum(map(len, ids)):
        return None
    groups: list[list[int]] = []
    room = 0
    for index, shared in zip(order, alike, strict=True):
        if not groups or len(ids[index]) - shared > room:
            groups.append([])
            room, shared = budget, 0
        groups[-1].append(index)
        room -= len(ids[index]) - shared
    return groups
