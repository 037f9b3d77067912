"""Attention over packed rows that costs nothing across documents.

Several documents lie one after another in a row. A dense mask over the row computes all pairs and throws
most away; here every document attends to itself alone: one after another, or all in one kernel where the GPU has it.
Registered with transformers under NAME; a `Documents` travels as the keyword `documents` through the model's forward.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from llm_finetune_kit.errors import ModelError
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


class Documents:
    """Where the documents of a pass lie: made once for a pass and read by every layer.

    `offsets`, int32 [documents + 1] on the device, is there where one kernel computes them all. No dataclass: a compiler
    that follows a layer would then look at every field, and make it anew for every new tuple of lengths.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.lengths = lengths
        self.longest = max(lengths)
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self.offsets = to_device(ends, device) if has_kernels(device) else None


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

    Without `documents` (generation) it is ordinary masked attention over the batch. On a CPU the core
    runs in float32, which measured 2.3 times faster than bfloat16 there on short documents; elsewhere in the number format
    of the values, as queries and keys may have been turned in float32.
    Returns [1, T, heads, d]. Raises ModelError for attention sinks (`s_aux`), which are not computed here.
    """
    if s_aux is not None:
        raise ModelError(8, "its attention has sinks, which cannot be trained here yet", fix="choose another model")
    dtype = query.dtype
    with torch.autocast(query.device.type, enabled=False):
        together = documents is not None and documents.offsets is not None
        if together and one_kernel(value.dtype, query.shape[3], softcap, dropout):
            return _all_documents(query, key, value, documents, scaling, sliding_window).to(dtype), None
        if query.device.type == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        else:
            query, key = query.to(value.dtype), key.to(value.dtype)
        if documents is None and query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            out = _one_token(query, key, value, attention_mask, dropout, scaling, softcap)
            return out.transpose(1, 2).to(dtype), None
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        if documents is not None:
            out = _each_document(query, key, value, documents, dropout, scaling, softcap, sliding_window)
        elif attention_mask is None and query.shape[2] == key.shape[2]:
            out = _document(query, key, value, dropout, scaling, softcap, sliding_window)
        else:
            out = _attend(query, key, value, attention_mask, dropout, scaling, softcap)
    return out.transpose(1, 2).to(dtype), None


def _all_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Any,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Every document in one kernel, which reads shared keys where they lie; [1, T, heads, d]."""
    parts = (part[0].transpose(0, 1).to(value.dtype).contiguous() for part in (query, key, value))
    window = (sliding_window - 1 if sliding_window is not None else -1, 0)
    offsets, longest = documents.offsets, documents.longest
    how: dict[str, Any] = {"scale": scaling, "window_size": window, "enable_gqa": query.shape[1] != key.shape[1]}
    out: torch.Tensor = varlen_attn(*parts, offsets, offsets, longest, longest, **how)
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
    """One document after another; a compiler would write a function of its own for every number of them."""
    spans = zip(*(part.split(documents.lengths, dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([_document(q, k, v, dropout, scaling, softcap, sliding_window) for q, k, v in spans], dim=2)


def _document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    length = query.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    if softcap is None and window is None:
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    return _attend(query, key, value, mask, dropout, scaling, softcap)


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
