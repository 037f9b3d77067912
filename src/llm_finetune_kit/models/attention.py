"""Attention over packed rows that costs nothing across documents.

Several documents lie one after another in a row. A dense mask over the row computes all pairs and throws
most away; here every document attends to itself alone, and a part of one that goes on where another part
ends (`data.prefixes`) to that one too. Registered with transformers under NAME; `document_lengths` and
`document_parents` travel as keywords through the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.models.cpu_attention import SHORTEST, BlockedAttention

NAME = "per_document"


def per_document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    document_lengths: tuple[int, ...] | None = None,
    document_parents: tuple[int, ...] | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; query [1, heads, T, d], key and value [1, kv heads, T, d].

    Without `document_lengths` (generation) it is ordinary masked attention over the batch. On a CPU torch's core
    runs in float32, which measured 2.3 times faster than bfloat16 there on short documents; longer ones in bfloat16
    have a core of their own (`cpu_attention`).
    Returns [1, T, heads, d]. Raises ModelError for attention sinks (`s_aux`), which are not computed here.
    """
    if s_aux is not None:
        raise ModelError(8, "its attention has sinks, which cannot be trained here yet", fix="choose another model")
    dtype = query.dtype
    with torch.autocast(query.device.type, enabled=False):
        if document_lengths is not None:
            parts = [part.split(document_lengths, dim=2) for part in (query, key, value)]
            spans = zip(parts[0], *(_with_beginnings(part, document_parents) for part in parts[1:]), strict=True)
            out = torch.cat([_document(q, k, v, dropout, scaling, softcap, sliding_window) for q, k, v in spans], dim=2)
            return out.transpose(1, 2), None
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            out = _one_token(*_for_core(query, key, value), attention_mask, dropout, scaling, softcap)
        elif attention_mask is None and query.shape[2] == key.shape[2]:
            out = _document(query, key, value, dropout, scaling, softcap, sliding_window)
        else:
            query, key, value = _for_core(query, key, value)
            groups = query.shape[1] // key.shape[1]
            out = _attend(query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, dropout, scaling, softcap)
    return out.transpose(1, 2).to(dtype), None


def _with_beginnings(parts: Sequence[torch.Tensor], parents: tuple[int, ...] | None) -> list[torch.Tensor]:
    """Keys or values [1, heads, n, d] of each part, behind those of the parts that it goes on from."""
    whole: list[torch.Tensor] = []
    for index, part in enumerate(parts):
        parent = -1 if parents is None else parents[index]
        whole.append(part if parent < 0 else torch.cat([whole[parent], part], dim=2))
    return whole


def _for_core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch's kernels take them: on a CPU in float32."""
    return (query.float(), key.float(), value.float()) if query.device.type == "cpu" else (query, key, value)


def _document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of the last n of m tokens: query [1, heads, n, d], key and value [1, kv heads, m, d]."""
    count, length = query.shape[2], key.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    plain = softcap is None and window is None
    if plain and not dropout and length >= SHORTEST and query.device.type == "cpu" and query.dtype is torch.bfloat16:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        own: torch.Tensor = BlockedAttention.apply(query[0], key[0], value[0], scale)[None]
        return own
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    query, key, value = _for_core(query, key, value)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if plain and count == length:
        out = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
    else:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
        if window is not None:
            mask = mask.triu(length - count + 1 - window)
        out = _attend(query, key, value, mask, dropout, scaling, softcap)
    return out.to(dtype)


def _one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """A decoding step: the heads that share keys ask as if they were tokens, so that the cache is not copied for each."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    if softcap is None:
        mask = mask.to(query.dtype) if mask is not None and mask.dtype != torch.bool else mask
        out = scaled_dot_product_attention(grouped, key, value, mask, dropout_p=dropout, scale=scaling)
    else:
        seen = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device) if mask is None else mask
        out = _attend(grouped, key, value, seen, dropout, scaling, softcap)
    return out.reshape(batch, heads, 1, width)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if softcap is None:
        causal = mask is None and query.shape[2] > 1
        return scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scaling, is_causal=causal)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        # not -inf: a row of padding that sees nothing would become NaN, and spread
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropout)
    return weights @ value


def per_document_mask(*, attention_mask: torch.Tensor | None = None, **facts: Any) -> torch.Tensor | None:
    """No mask where documents are given by their lengths (no 2-D mask, no cache); otherwise the usual one."""
    if attention_mask is None and facts["q_length"] == facts["kv_length"]:
        return None
    mask: torch.Tensor | None = sdpa_mask(attention_mask=attention_mask, **facts)
    return mask


def register() -> None:
    """Make NAME known to transformers as an attention implementation."""
    AttentionInterface.register(NAME, per_document_attention)
    AttentionMaskInterface.register(NAME, per_document_mask)
