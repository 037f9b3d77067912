"""Causal attention of one document on a CPU in bfloat16: torch's own kernel takes 1.1 to 2.5 times as long for it.

    P = softmax(s Q K^T + mask),  O = P V                                     (rows of Q in blocks, keys up to the block's end)
    dV = P^T dO,  dS = P * (dO V^T - rowsum(P * dO V^T)),  dQ = s dS K,  dK = s dS^T Q

Scores and softmax are float32, the other products take bfloat16 and add up in float32, as in a flash kernel. Query heads that
share keys are computed as rows of one product. Short documents keep P for the backward pass, longer ones form it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

SHORTEST = 128  # keys below which torch's kernel in float32 is nearly as fast, and more exact, where it needs no mask
ROWS = 128  # queries of a block: its scores stay in the cache
KEPT = 512  # keys up to which P is kept: 2 bytes for each pair that is seen


class BlockedAttention(torch.autograd.Function):
    """query [heads, n, d], the last n of m tokens, and key and value [kv heads, m, d] in bfloat16 -> [heads, n, d]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        query, key_rows = _by_key(query, key), key.float().transpose(1, 2)
        out, kept = [], []
        for rows, seen in _blocks(query, key):
            weights = _weights(query[:, :, rows], key_rows[:, :, :seen], scale)
            out.append(_rows(torch.bmm(weights, value[:, :seen]), query))
            if key.shape[1] <= KEPT:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return _joined(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        slope = grad_outputs[0].view(query.shape)
        key_rows = None if kept else key.float().transpose(1, 2)
        grad_query: list[torch.Tensor] = []
        grad_key: Any = None
        grad_value: Any = None
        blocks = list(_blocks(query, key))
        for rows, seen in reversed(blocks):  # the last one sees all keys
            asked, out_slope = (part[:, :, rows].flatten(1, 2) for part in (query, slope))
            weights = kept.pop() if key_rows is None else _weights(query[:, :, rows], key_rows[:, :, :seen], ctx.scale)
            weight_slope = torch.bmm(out_slope, value[:, :seen].transpose(1, 2))
            score_slope = torch.ops.aten._softmax_backward_data(weight_slope, weights, -1, weights.dtype).mul_(ctx.scale)
            grad_query.insert(0, _rows(torch.bmm(score_slope, key[:, :seen]), query))
            grad_key = _added(grad_key, torch.bmm(score_slope.transpose(1, 2), asked), len(blocks))
            grad_value = _added(grad_value, torch.bmm(weights.transpose(1, 2), out_slope), len(blocks))
        return _joined(grad_query), grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _added(total: torch.Tensor | None, part: torch.Tensor, blocks: int) -> Any:
    """The sum over blocks [kv heads, keys, d], in float32 where there are several; `part` may be of the first keys alone."""
    if total is None:
        return part if blocks == 1 else part.float()
    total[:, : part.shape[1]] += part
    return total


def _by_key(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Queries as [kv heads, heads that share them, n, d]."""
    return query.reshape(key.shape[0], -1, *query.shape[1:])


def _blocks(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """The rows of each block of queries, and how many keys its last row sees."""
    rows = query.shape[2]
    for start in range(0, rows, ROWS):
        end = min(start + ROWS, rows)
        yield slice(start, end), key.shape[1] - rows + end


def _rows(product: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[kv heads, shared x rows, d] as [kv heads, shared, rows, d]."""
    return product.view(query.shape[0], query.shape[1], -1, product.shape[-1])


def _joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Blocks of rows [kv heads, shared, rows, d] as [heads, n, d]."""
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)).flatten(0, 1)


def _weights(query: torch.Tensor, key_rows: torch.Tensor, scale: float) -> torch.Tensor:
    """P of a block in the queries' dtype, [kv heads, shared x rows, keys]; `key_rows` is K^T in float32."""
    rows, seen = query.shape[2], key_rows.shape[2]
    asked = query.flatten(1, 2).float()
    scores = torch.baddbmm(asked.new_empty(1), asked, key_rows, beta=0, alpha=scale)
    scores.view(*query.shape[:3], seen)[..., seen - rows :].add_(_later(rows))
    return scores.softmax(-1).to(query.dtype)


@lru_cache(maxsize=ROWS)
def _later(rows: int) -> torch.Tensor:
    """What hides later keys from each of as many queries, [rows, rows]."""
    return torch.full((rows, rows), float("-inf")).triu_(1)
