"""Which examples make a step is a function of numbers alone; passes hold all of them, once, within their budget."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm_finetune_kit.data.batches import (
    Pass,
    arrange,
    evaluation_passes,
    make_passes,
    order,
    step_examples,
    steps_per_epoch,
)
from llm_finetune_kit.data.masks import Tokens


def tokens_of(lengths: list[int], seed: int = 0, *, learned: float = 0.5) -> Tokens:
    """Rows whose ids name their example: id = 1000 * example + place."""
    generator = np.random.default_rng(seed)
    ids = np.concatenate([1000 * index + np.arange(length) for index, length in enumerate(lengths)])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    trained = generator.random(len(ids)) < learned
    return Tokens(ids.astype(np.int32), trained, starts, np.arange(len(lengths), dtype=np.int32))


def uneven(count: int, seed: int, longest: int = 300) -> list[int]:
    generator = random.Random(seed)
    return [generator.choice([1, 2, 5, generator.randint(1, longest)]) for _ in range(count)]


# --- order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "per_step"), [(1, 1), (1, 16), (7, 3), (16, 16), (17, 16), (100, 7)])
def test_every_example_comes_once_an_epoch(examples: int, per_step: int) -> None:
    steps = steps_per_epoch(examples, per_step)
    for epoch in range(3):
        taken = [step_examples(examples, per_step, 42, epoch * steps + step) for step in range(steps)]
        assert sorted(np.concatenate(taken).tolist()) == list(range(examples))
        assert [len(step) for step in taken[:-1]] == [per_step] * (steps - 1)
        assert len(taken[-1]) == examples - per_step * (steps - 1) > 0


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_a_pure_function() -> None:
    wanted = [step_examples(23, 4, 7, step).tolist() for step in range(20)]
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    backwards = [step_examples(23, 4, 7, step).tolist() for step in reversed(range(20))]
    assert backwards[::-1] == wanted


def test_the_order_is_the_same_in_every_process_and_version() -> None:
    """A resume may come from another process: the order must never hang on hashing or on a library's default."""
    assert order(10, 42, 0).tolist() == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
    code = "from llm_finetune_kit.data.batches import step_examples; print(step_examples(1000, 8, 42, 300).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == str(step_examples(1000, 8, 42, 300).tolist())


# --- arranging ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_arranging_keeps_every_index_once_and_the_budget(seed: int) -> None:
    lengths, budget = uneven(60, seed), random.Random(seed).choice([1, 64, 256, 1000])
    groups = arrange(lengths, budget)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[index] for index in group) <= budget or len(group) == 1


@pytest.mark.parametrize("seed", range(5))
def test_arranging_packs_tightly(seed: int) -> None:
    """First fit, longest first, never needs more than 11/9 of the best number of groups and one (Johnson 1973)."""
    lengths, budget = [min(length, 256) for length in uneven(200, seed)], 256
    at_least = -(-sum(lengths) // budget)
    assert len(arrange(lengths, budget)) <= 11 / 9 * at_least + 1


def test_without_packing_each_stands_alone() -> None:
    assert sorted(arrange([5, 1, 9], 100, packing=False)) == [[0], [1], [2]]


def test_nothing_makes_no_groups() -> None:
    assert arrange([], 10) == []


# --- passes ------------------------------------------------------------------------------------------------


def pieces(work: Pass) -> list[tuple[list[int], list[int], list[bool]]]:
    """Ids, positions and kept places of each document of a pass."""
    bounds = np.cumsum([0, *work.lengths]).tolist()
    rows = (work.input_ids[0].tolist(), work.position_ids[0].tolist(), work.keep[0].tolist())
    return [tuple(row[begin:end] for row in rows) for begin, end in itertools.pairwise(bounds)]  # type: ignore[misc]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_passes_hold_what_the_masks_say(seed: int, packing: bool) -> None:
    lengths = uneven(30, seed, longest=90)
    tokens = tokens_of(lengths, seed, learned=random.Random(seed).choice([0.02, 0.3, 1.0]))
    passes = make_passes(tokens, range(30), 128, packing=packing)
    labels_of: dict[int, list[int]] = {}
    for work in passes:
        assert work.input_ids.shape == work.position_ids.shape == work.keep.shape == (1, sum(work.lengths))
        assert work.input_ids.dtype == work.position_ids.dtype == work.labels.dtype == torch.int64
        assert work.keep.dtype == torch.bool
        assert work.tokens == sum(work.lengths) <= 128
        assert int(work.keep.sum()) == len(work.labels) == work.targets
        labels = iter(work.labels.tolist())
        for ids, positions, keep in pieces(work):
            assert positions == list(range(len(ids))), "positions restart with each document"
            assert keep[-1], "a document ends where its last learned token is predicted"
            example = ids[0] // 1000
            assert ids == [1000 * example + place for place in range(len(ids))]
            assert example not in labels_of
            labels_of[example] = [next(labels) for kept in keep if kept]
            assert labels_of[example] == [ids[place] + 1 for place, kept in enumerate(keep) if kept]
    for example, length in enumerate(lengths):
        learned = np.flatnonzero(tokens.example(example)[1])
        expected = [1000 * example + int(place) for place in learned if place > 0]
        assert labels_of.get(example, []) == expected, (example, length)
        assert len(expected) == tokens.targets[example]


def test_a_pass_is_cut_after_its_last_target() -> None:
    tokens = tokens_of([10, 4], learned=0)
    tokens.trained[[3, 5]] = True
    (work,) = make_passes(tokens, [0, 1], 100)
    assert work.lengths == (5,)  # ids 0 to 4 predict up to id 5; the second example has nothing to learn
    assert work.input_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert work.labels.tolist() == [3, 5]


def test_a_first_token_is_never_a_target() -> None:
    tokens = tokens_of([3, 1, 2], learned=1)
    assert tokens.targets.tolist() == [2, 0, 1]
    assert sum(work.targets for work in make_passes(tokens, range(3), 100)) == 3


def test_nothing_to_learn_makes_no_passes() -> None:
    assert make_passes(tokens_of([5, 7], learned=0), [0, 1], 100) == []


def test_a_document_longer_than_the_budget_has_a_pass_of_its_own() -> None:
    passes = make_passes(tokens_of([500, 5, 5], learned=1), range(3), 64)
    assert sorted(work.lengths for work in passes) == [(4, 4), (499,)]


@pytest.mark.parametrize("seed", range(4))
def test_passes_come_apart_into_their_documents(seed: int) -> None:
    for work in make_passes(tokens_of(uneven(20, seed), seed), range(20), 512):
        alone = list(work.documents())
        assert tuple(one.lengths[0] for one in alone) == work.lengths
        assert [piece for one in alone for piece in pieces(one)] == pieces(work)
        assert torch.cat([one.labels for one in alone]).tolist() == work.labels.tolist()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_evaluation_sees_every_example_once_within_the_budget(seed: int, packing: bool) -> None:
    tokens = tokens_of([min(length, 128) for length in uneven(50, seed)], seed, learned=0.5)
    passes = list(evaluation_passes(tokens, 128, packing=packing))
    seen = [ids[0] // 1000 for work in passes for ids, _, _ in pieces(work)]
    assert sorted(seen) == np.flatnonzero(tokens.targets > 0).tolist()
    assert sum(work.targets for work in passes) == tokens.targets.sum()
    assert max(work.tokens for work in passes) <= 128


# --- beginnings that are shared ----------------------------------------------------------------------------


def branching(seed: int, count: int, longest: int = 40) -> Tokens:
    """Rows of few different tokens, grown from each other's beginnings; what is learned begins anywhere behind the first."""
    generator = random.Random(seed)
    documents: list[list[int]] = []
    for _ in range(count):
        before = generator.choice(documents)[: generator.randint(0, longest)] if documents and generator.random() < 0.7 else []
        documents.append([*before, *(generator.randint(0, 2) for _ in range(generator.randint(2, longest)))])
    ids = np.concatenate(documents).astype(np.int32)
    lengths = [len(document) for document in documents]
    trained = np.concatenate([np.arange(length) >= generator.randint(1, length) for length in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(ids, trained, starts, np.arange(count, dtype=np.int32))


def read(work: Pass) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The documents of a pass as (tokens, positions that are kept, labels), put together from its parts."""
    ids, positions, keep = (part[0].split(work.lengths) for part in (work.input_ids, work.position_ids, work.keep))
    labels, parents, found = work.labels.tolist(), work.parents or [-1] * len(work.lengths), []
    for index in range(len(work.lengths)):
        if not keep[index].any():
            continue
        chain, at = [index], parents[index]
        while at >= 0:
            chain.insert(0, at)
            at = parents[at]
        whole = torch.cat([ids[part] for part in chain])
        kept = torch.cat([keep[part] for part in chain]).nonzero().flatten().tolist()
        assert torch.cat([positions[part] for part in chain]).tolist() == list(range(len(whole)))
        found.append((tuple(whole.tolist()), tuple(kept), tuple(labels[: len(kept)])))
        labels = labels[len(kept) :]
    assert not labels
    return sorted(found)


@pytest.mark.parametrize("seed", range(60))
def test_shared_passes_hold_the_same_documents_and_fewer_tokens(seed: int) -> None:
    tokens = branching(seed, count=1 + seed % 17)
    rows, budget = range(len(tokens)), random.Random(seed).choice([20, 60, 150, 10**6])
    plain, shared = (make_passes(tokens, rows, budget, sharing=sharing) for sharing in (None, 8))
    assert sorted(itertools.chain.from_iterable(map(read, shared))) == sorted(itertools.chain.from_iterable(map(read, plain)))
    assert sum(work.tokens + work.shared for work in shared) == sum(work.tokens for work in plain)
    for work in shared:
        assert work.tokens <= budget or len(read(work)) == 1
        assert all(parent < index for index, parent in enumerate(work.parents or []))


def test_a_long_prompt_that_all_rows_share_stands_once_a_pass() -> None:
    prompt, answers = list(range(1500)), [[2000 + row] * 20 for row in range(16)]
    ids = np.concatenate([prompt + answer for answer in answers]).astype(np.int32)
    trained = np.concatenate([np.arange(1520) >= 1500 for _ in answers])
    tokens = Tokens(ids, trained, np.arange(17) * 1520, np.arange(16, dtype=np.int32))
    (work,) = make_passes(tokens, range(16), 2048, sharing=8)
    assert work.tokens == 1499 + 16 * 20
    held_out = list(evaluation_passes(tokens, 2048, sharing=8))
    assert [work.tokens for work in held_out] == [1499 + 16 * 20]
    assert len(make_passes(tokens, range(16), 2048, packing=False, sharing=8)) == 16
