"""The loss, and the gradient of one optimizer step. Everything that decides what is learned is on this page.

The loss is cross entropy in float32 over target tokens only, summed and divided by the step's target tokens:
1 x 8 examples = 8 x 1 = packed = padded, to rounding. Logits exist for a few target rows at a time, and their
gradient is formed while they are there (4VH multiplications per target with a frozen head instead of 6VH).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import log_softmax

from llm_finetune_kit.data.batches import Pass
from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.models.attention import Documents
from llm_finetune_kit.models.transfer import to_device
from llm_finetune_kit.plan.memory import HEAD_SLICE, HEAD_WORKSPACE


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of `labels` [n] under `hidden` [n, H] @ `weight` [V, H]^T, chunk by chunk."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        softcap: float | None,
        dtype: torch.dtype,
        scale: float,
    ) -> torch.Tensor:
        matrix = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        learns, head_learns = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if head_learns else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for part in _slices(len(labels), HEAD_WORKSPACE[hidden.device.type], matrix.element_size() * len(matrix)):
            states, wanted = hidden[part].to(dtype), labels[part, None]
            scores = states @ matrix.T
            for few in _slices(len(scores), HEAD_SLICE[hidden.device.type], 4 * len(matrix)):
                loss += _to_slope(scores[few], wanted[few], bias, softcap, grad_bias, learns or head_learns)
            if grad_hidden is not None:
                grad_hidden[part] = (scores @ matrix).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (scores.T @ states).float()
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.scale = scale
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        factor = grad_outputs[0] * ctx.scale
        grads = tuple(None if grad is None else grad.mul_(factor.to(grad.dtype)) for grad in ctx.grads)
        ctx.grads = None
        return (*grads, None, None, None, None)


def _slices(rows: int, room: int, bytes_per_row: int) -> Iterator[slice]:
    """`rows` in parts that each fit into `room` bytes."""
    step = max(1, room // bytes_per_row)
    return (slice(start, start + step) for start in range(0, rows, step))


def _to_slope(
    scores: torch.Tensor,
    wanted: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    grad_bias: torch.Tensor | None,
    learns: bool,
) -> torch.Tensor:
    """The summed cross entropy of `wanted` [n, 1] under `scores` [n, V], which become its derivative where that is wanted."""
    logits, slope_of_cap = scores, None
    if bias is not None:
        logits = logits.float() + bias.float()
    if softcap:
        capped = torch.tanh(logits.float() / softcap)
        logits, slope_of_cap = capped * softcap, 1 - capped.square()
    log_probabilities = log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -log_probabilities.gather(1, wanted).sum()
    if not learns:
        return loss
    slope = log_probabilities.exp_()
    slope.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
    if slope_of_cap is not None:
        slope *= slope_of_cap
    if grad_bias is not None:
        grad_bias += slope.sum(0)
    scores.copy_(slope)
    return loss


class Objective:
    """The loss of passes under a model.

    `dtype` is what matrix products use. Where the model's head is a plain linear layer (checked by comparing
    logits once, never assumed) it is computed by HeadLoss; otherwise by the model itself. Where the model keeps
    packed documents apart (probed once, too) it computes whole passes; otherwise one document at a time. Where it
    also lets a document go on from a part of the pass that others share, `shares` is true.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = base.base_model
        self._head = base.get_output_embeddings()
        self.softcap: float | None = getattr(base.config, "final_logit_softcapping", None)
        self.device = self.head.weight.device
        self.plain_head = type(self.head) is torch.nn.Linear and self._head_is_plain(base)
        self.packs, self.shares = self._abilities(base)
        self.not_compiled: str | None = None  # why its blocks are not, where that was asked for
        self.not_fused: str | None = None  # why Liger's kernels are not used, where that was decided

    @property
    def head(self) -> Any:
        """The output layer now in use: where it is trained beside the original one, that depends on a switch."""
        if not hasattr(self._head, "modules_to_save"):
            return self._head
        return self._head.original_module if self._head.disable_adapters else self._head.modules_to_save["default"]

    def _head_is_plain(self, base: Any) -> bool:
        ids = torch.arange(4, device=self.device)[None] % base.config.vocab_size
        was_training = base.training
        base.eval()
        with torch.no_grad(), self.precision():
            whole = base(input_ids=ids, use_cache=False).logits
            parts = self.head(self.decoder(input_ids=ids, use_cache=False).last_hidden_state)
            if self.softcap:
                parts = torch.tanh(parts / self.softcap) * self.softcap
        base.train(was_training)
        return torch.equal(whole, parts)

    def _abilities(self, base: Any) -> tuple[bool, bool]:
        """Whether a document in a pass comes out as it does alone: behind other documents, and behind a shared beginning.

        Some models do not hand `documents` or positions down to their attention. What that does is
        measured by the same tokens as one document, so the bounds hold in every precision. Dropout would draw once
        for all documents that share a part, which is not what each would have alone. Raises ModelError if a token
        sees those after it, which no way of computing could put right.
        """
        tokens = torch.arange(11, device=self.device) % base.config.get_text_config().vocab_size
        first, other, second, later = tokens[:3], tokens[3:6], tokens[6:10], tokens[7:11]
        was_training = base.training
        base.eval()
        with torch.no_grad(), self.precision():
            packed, repacked = (self._hidden(torch.cat([before, second]), (3, 4))[3:] for before in (first, other))
            joined, rejoined = (self._hidden(torch.cat([before, second]), (7,))[3:] for before in (first, other))
            alone, foretold = (self._hidden(torch.cat([second[:2], after]), (4,)) for after in (second[2:], later[2:]))
            branched = self._hidden(torch.cat([first, other, second]), (3, 3, 4), (-1, 0, 0))[6:]
        base.train(was_training)
        seen = (joined - rejoined).norm()  # what the tokens before do where they may be seen
        if (alone - foretold)[:2].norm() > 0.2 * seen:
            raise ModelError(9, "its attention is not causal here", fix="choose another model")
        leaks = (packed - repacked).norm() > 0.2 * seen
        moves = (packed - alone).norm() > 0.2 * (joined - alone).norm()
        packs = not bool(leaks) and not bool(moves)
        strays = (branched - joined).norm() > 0.2 * (alone - joined).norm()
        return packs, packs and not bool(strays) and not _has_dropout(self.model)

    def _hidden(self, ids: torch.Tensor, lengths: tuple[int, ...], parents: tuple[int, ...] | None = None) -> torch.Tensor:
        """Last hidden states [tokens, H] of parts in one row; those with a parent all go on from the first part."""
        starts = [0 if parent < 0 else lengths[0] for parent in parents or [-1] * len(lengths)]
        spans = zip(starts, lengths, strict=True)
        positions = torch.cat([torch.arange(start, start + length, device=self.device) for start, length in spans])
        documents = Documents(lengths, self.device, parents)
        asked = {"position_ids": positions[None], "use_cache": False, "documents": documents}
        states: torch.Tensor = self.decoder(input_ids=ids[None], **asked).last_hidden_state[0]
        return states

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which the model is to run."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def summed(self, work: Pass, scale: float = 1.0) -> torch.Tensor:
        """`scale` times the summed loss of a pass's targets, a float32 scalar."""
        if len(work.lengths) > 1 and not self.packs:
            return torch.stack([self.summed(document, scale) for document in work.documents()]).sum()
        return self._loss(self._states(work), to_device(work.labels, self.device), scale)

    def by_document(self, work: Pass) -> torch.Tensor:
        """The summed loss of each document of a pass, float32 [documents]; what `summed` would give for each alone."""
        if len(work.lengths) > 1 and not self.packs:
            return torch.cat([self.by_document(document) for document in work.documents()])
        counts = [int(part.sum()) for part in work.keep[0].split(work.lengths)]
        labels = to_device(work.labels, self.device)
        parts = zip(self._states(work).split(counts), labels.split(counts), strict=True)
        return torch.stack([self._loss(states, labels, 1.0) for states, labels in parts])

    def _states(self, work: Pass) -> torch.Tensor:
        """What the loss of a pass is made of: hidden states [targets, H], or logits [targets, V] where the head is not plain."""
        rows = to_device(work.rows, self.device)
        asked = {
            "input_ids": to_device(work.input_ids, self.device),
            "position_ids": to_device(work.position_ids, self.device),
            "use_cache": False,
            "documents": Documents(work.lengths, self.device, work.parents),
        }
        with self.precision():
            if self.plain_head:
                hidden: torch.Tensor = self.decoder(**asked).last_hidden_state[0].index_select(0, rows)
                return hidden
            logits: torch.Tensor = self.model(**asked, logits_to_keep=rows).logits
            return logits.reshape(-1, logits.shape[-1])

    def _loss(self, states: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        if self.plain_head:
            weight, bias = self.head.weight, self.head.bias
            if not torch.is_grad_enabled():  # which HeadLoss cannot see, and would form a gradient for nobody
                weight, bias = weight.detach(), None if bias is None else bias.detach()
            loss: torch.Tensor = HeadLoss.apply(states, weight, bias, labels, self.softcap, self.dtype, scale)
            return loss
        return scale * torch.nn.functional.cross_entropy(states.float(), labels, reduction="sum")


def _has_dropout(model: Any) -> bool:
    """Whether training draws random numbers in the forward pass."""
    layers = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or bool(getattr(model.config, "attention_dropout", 0.0))


def accumulate(objective: Objective, passes: list[Pass], loss_scale: float = 1.0) -> torch.Tensor:
    """Add the gradient of the step's mean loss over its target tokens to `.grad`; return that loss, detached.

    The gradient, not the loss, is `loss_scale` times as large (see `training.scaling`).
    """
    targets = sum(work.targets for work in passes)
    loss = torch.zeros((), dtype=torch.float32, device=objective.device)
    for work in passes:
        part = objective.summed(work, 1.0 / targets)
        part.backward(torch.full_like(part, loss_scale))
        loss += part.detach()
    return loss


@torch.no_grad()
def mean_loss(objective: Objective, passes: Any) -> tuple[float, int]:
    """Mean loss over all target tokens of the passes, in nats, and their number; the model is left in eval mode.

    The sums are read when all are on their way, so that a GPU does not stand still between passes.
    """
    objective.model.eval()
    sums, targets = [], 0
    for work in passes:
        sums.append(objective.summed(work))
        targets += work.targets
    return (sum(torch.stack(sums).tolist()) if sums else 0.0) / max(1, targets), targets
