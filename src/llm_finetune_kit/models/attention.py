"""Attention over packed rows that costs nothing across documents.

Several documents lie one after another in a row. A dense mask over the row computes all pairs and throws
most away; here every document attends to itself alone, and a part of one that goes on where another part ends
(`data.prefixes`) to that one too: one after another, or all in one kernel where the GPU has it. Registered with
transformers under NAME; a `Documents` travels as the keyword `documents` through the model's forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.models.cpu_attention import SHORTEST, BlockedAttention
from llm_finetune_kit.models.transfer import to_device

try:
    from torch.nn.attention import varlen
except ImportError:  # before torch 2.10
    varlen_attn: Any = None
else:
    varlen_attn = varlen.varlen_attn

NAME = "per_document"
NEEDED = {"scale", "window_size", "enable_gqa"}  # arguments of varlen_attn, which its first versions lack
WIDEST = 256  # heads that flash kernels compute
FLASH = (8, 0)  # the compute capability from which there are flash kernels


class Spans:
    """Documents as one kernel takes them, on its device: where each part's queries lie, and the keys that they see.

    `offsets` and `key_offsets` are int32 [parts + 1]; `places`, int64, are the keys in order where parts share some. No
    dataclass: a compiler that follows a layer would then look at every field, and make it anew for every new one.
    """

    def __init__(self, lengths: tuple[int, ...], parents: tuple[int, ...] | None, device: torch.device) -> None:
        self.offsets = self.key_offsets = to_device(_offsets(lengths), device)
        self.longest = self.most_keys = max(lengths)
        self.places: torch.Tensor | None = None
        if parents is not None:
            seen = _with_beginnings(torch.arange(sum(lengths)).split(lengths), parents)
            counts = tuple(len(places) for places in seen)
            self.places, self.key_offsets = (to_device(part, device) for part in (torch.cat(seen), _offsets(counts)))
            self.most_keys = max(counts)


def _offsets(counts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)


class Documents:
    """Where the documents of a pass lie, made once for a pass and read by every layer: the parts' lengths, and for each the
    part that it goes on from (-1: none; `data.batches.Pass`). `spans` is there where one kernel computes them all."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device, parents: tuple[int, ...] | None = None) -> None:
        self.lengths = lengths
        self.parents = parents
        self.spans = Spans(lengths, parents, device) if has_kernels(device) else None


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether this device computes documents of any lengths in one kernel; tried once with a tiny pass."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < FLASH:
        return False
    return has_arguments(varlen_attn) and _kernels_run(device)


def has_arguments(function: Any) -> bool:
    """Whether this version of torch's function takes what is asked of it here; None for a torch without it."""
    return function is not None and set(inspect.signature(function).parameters) >= NEEDED


def _kernels_run(device: torch.device) -> bool:
    try:
        query, key, value = (
            torch.ones(5, heads, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for heads in (2, 1, 1)
        )
        offsets = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        with torch.enable_grad():
            varlen_attn(query, key, value, offsets, offsets, 3, 3, window_size=(-1, 0), enable_gqa=True).sum().backward()
        return all(part.grad is not None and bool(part.grad.isfinite().all()) for part in (query, key, value))
    except RuntimeError:  # a build of torch without kernels for this GPU
        return False


def one_kernel(dtype: torch.dtype, width: int, softcap: float | None, dropout: float) -> bool:
    """Whether the flash kernels compute this: heads of `width` in 16 bits, no capped scores and no dropout."""
    fits = width % 8 == 0 and (width <= 192 or width == WIDEST)  # between those some GPUs have no backward pass
    return dtype in (torch.bfloat16, torch.float16) and fits and softcap is None and dropout == 0.0


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
    documents: Documents | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; query [1, heads, T, d], key and value [1, kv heads, T, d].

    Without `documents` (generation) it is ordinary masked attention over the batch. On a CPU torch's core runs in float32,
    which measured 2.3 times faster than bfloat16 there on short documents, and longer ones in bfloat16 have a core of their
    own (`cpu_attention`); elsewhere in the number format of the values, as queries and keys may have been turned in float32.
    Returns [1, T, heads, d]. Raises ModelError for attention sinks (`s_aux`), which are not computed here.
    """
    if s_aux is not None:
        raise ModelError(8, "its attention has sinks, which cannot be trained here yet", fix="choose another model")
    dtype = query.dtype
    with torch.autocast(query.device.type, enabled=False):
        if documents is not None:
            if documents.spans is not None and one_kernel(value.dtype, query.shape[3], softcap, dropout):
                return _all_documents(query, key, value, documents.spans, scaling, sliding_window).to(dtype), None
            return _each_document(query, key, value, documents, dropout, scaling, softcap, sliding_window).to(dtype), None
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            out = _one_token(*_for_core(query, key, value), attention_mask, dropout, scaling, softcap)
        elif attention_mask is None and query.shape[2] == key.shape[2]:
            out = _document(query, key, value, dropout, scaling, softcap, sliding_window)
        else:
            query, key, value = _for_core(query, key, value)
            groups = query.shape[1] // key.shape[1]
            out = _attend(query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, dropout, scaling, softcap)
    return out.transpose(1, 2).to(dtype), None


def _all_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """Every document in one kernel, which reads shared keys where they lie; [1, T, heads, d]."""
    query, key, value = (part[0].transpose(0, 1).to(value.dtype).contiguous() for part in (query, key, value))
    if spans.places is not None:
        key, value = key[spans.places], value[spans.places]
    window = (sliding_window - 1 if sliding_window is not None else -1, 0)
    how: dict[str, Any] = {"scale": scaling, "window_size": window, "enable_gqa": query.shape[1] != key.shape[1]}
    out: torch.Tensor = varlen_attn(query, key, value, spans.offsets, spans.key_offsets, spans.longest, spans.most_keys, **how)
    return out[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _each_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """One document after another, [1, T, heads, d]; a compiler would write a function of its own for every number of them."""
    parts = [part.split(documents.lengths, dim=2) for part in (query, key, value)]
    spans = zip(parts[0], *(_with_beginnings(part, documents.parents) for part in parts[1:]), strict=True)
    out = [_document(q, k, v, dropout, scaling, softcap, sliding_window) for q, k, v in spans]
    return torch.cat([part.transpose(1, 2) for part in out], dim=1)


def _with_beginnings(parts: Sequence[torch.Tensor], parents: tuple[int, ...] | None) -> list[torch.Tensor]:
    """Keys or values [1, heads, n, d], or places [n], of each part behind those of the parts that it goes on from."""
    whole: list[torch.Tensor] = []
    for index, part in enumerate(parts):
        parent = -1 if parents is None else parents[index]
        whole.append(part if parent < 0 else torch.cat([whole[parent], part], dim=-2 if part.dim() > 1 else 0))
    return whole


def _for_core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch's kernels take them: on a CPU in float32, elsewhere all in the format of the values."""
    if query.device.type == "cpu":
        return query.float(), key.float(), value.float()
    return query.to(value.dtype), key.to(value.dtype), value


def _document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of the last n of m tokens: query [batch, heads, n, d], key and value [batch, kv heads, m, d]."""
    count, length = query.shape[2], key.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    plain = softcap is None and window is None
    narrow = query.device.type == "cpu" and query.dtype is torch.bfloat16 and len(query) == 1
    if narrow and plain and not dropout and (length >= SHORTEST or count < length):
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
