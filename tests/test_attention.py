"""Attention of one document in bfloat16 on a CPU against torch's own in float64, and shared beginnings of prompts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llm_finetune_kit.models.attention import Documents, per_document_attention
from llm_finetune_kit.models.cpu_attention import KEPT, ROWS, SHORTEST, BlockedAttention

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(tokens: int, heads: int, kv_heads: int, size: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys and values [1, heads, tokens, 16] and the slope of the result, in bfloat16."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, count, tokens, 16) for count in (heads, kv_heads, kv_heads, heads)]
    return [(size * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes]


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("tokens", [64, ROWS, ROWS + 1, 2 * ROWS + 37, KEPT + 90])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_it_is_causal_attention_to_the_precision_of_bfloat16(tokens: int, kv_heads: int) -> None:
    query, key, value, slope = inputs(tokens, 6, kv_heads, size=2.0)
    given = [part[0].clone().requires_grad_() for part in (query, key, value)]
    out = BlockedAttention.apply(*given, 0.25)
    out.backward(slope[0])
    exact = [part.double().requires_grad_() for part in (query, key, value)]
    wanted = scaled_dot_product_attention(*exact, scale=0.25, is_causal=True, enable_gqa=True)
    wanted.backward(slope.double())
    assert apart(out, wanted[0]) < 6e-3
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad.dtype is torch.bfloat16
        assert apart(ours.grad, theirs.grad[0]) < 1e-2


def test_a_kept_and_a_recomputed_pair_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, slope = inputs(200, 4, 2)
    found = []
    for kept in (10**6, 0):
        monkeypatch.setattr("llm_finetune_kit.models.cpu_attention.KEPT", kept)
        given = [part[0].clone().requires_grad_() for part in (query, key, value)]
        BlockedAttention.apply(*given, 0.25).backward(slope[0])
        found.append([part.grad for part in given])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", [{}, {"sliding_window": 50}, {"softcap": 3.0}], ids=["plain", "window", "softcap"])
def test_parts_that_go_on_from_a_shared_beginning_are_whole_documents(dtype: torch.dtype, extra: dict[str, float]) -> None:
    """A tree of 30 tokens, under it 20 of which 9 and 128 go on, and 40: three documents, whose beginnings stand once."""
    lengths, parents = (30, 20, 9, SHORTEST, 40), (-1, 0, 1, 1, 0)
    chains = [[0, 1, 2], [0, 1, 3], [0, 4]]
    query, key, value, slope = (part.to(dtype) for part in inputs(sum(lengths), 4, 2))
    module = torch.nn.Module()
    given = [part.clone().requires_grad_() for part in (query, key, value)]
    out, _ = per_document_attention(module, *given, None, documents=Documents(lengths, CPU, parents), **extra)
    out.backward(slope.transpose(1, 2))
    spans = torch.arange(sum(lengths)).split(lengths)
    apart_from_each_other = [part.clone().requires_grad_() for part in (query, key, value)]
    for chain in chains:
        places = torch.cat([spans[part] for part in chain])
        alone = [part[:, :, places] for part in apart_from_each_other]
        wanted, _ = per_document_attention(module, *alone, None, documents=Documents((len(places),), CPU), **extra)
        own = slice(len(places) - lengths[chain[-1]], None)  # what is shared sends its slope back once, below
        wanted[:, own].backward(slope.transpose(1, 2)[:, spans[chain[-1]]])
        assert apart(out[:, spans[chain[-1]]], wanted[:, own].double()) < (1e-5 if dtype is torch.float32 else 1e-2)
    for shared in ([0], [0, 1]):
        places = torch.cat([spans[part] for part in shared])
        alone = [part[:, :, places] for part in apart_from_each_other]
        wanted, _ = per_document_attention(module, *alone, None, documents=Documents((len(places),), CPU), **extra)
        wanted[:, -lengths[shared[-1]] :].backward(slope.transpose(1, 2)[:, spans[shared[-1]]])
    for ours, theirs in zip(given, apart_from_each_other, strict=True):
        assert apart(ours.grad, theirs.grad.double()) < (1e-5 if dtype is torch.float32 else 2e-2)


def test_every_row_of_a_batch_is_answered() -> None:
    """Prompts of one length in a batch have no mask and no documents."""
    query, key, value, _ = inputs(SHORTEST + 3, 4, 2)
    two = [torch.cat([part, 2 * part]) for part in (query, key, value)]
    out, _ = per_document_attention(torch.nn.Module(), *two, None)
    for row in range(2):
        alone, _ = per_document_attention(torch.nn.Module(), *(part[row : row + 1] for part in two), None)
        assert apart(out[row], alone[0].double()) < 1e-2
