"""Products of frozen weights with LoRA beside them, computed several at once, with backwards written from the mathematics.

    y = x W + b + s (x A) B          (A [in, r], B [r, out]: transposes of PEFT's lora_A and lora_B)
    dB = s (x A)^T dy,  dA = s x^T (dy B^T),  dx = dy W^T + s (dy B^T) A^T,  db = sum of dy

The adapter's product is added in place, so nothing as wide as y is written but y itself. Layers that read the same x have
their A side by side: x is read once for all of them, and dx is one tensor that each layer adds to. Of a whole MLP only x and
what comes before the activation is kept; the rest is formed again when its gradient is due. A W in 4 or 8 bits is unpacked once
forward and once backward, into memory that all layers share, and used before the next is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.functional import gelu, silu
from transformers.pytorch_utils import Conv1D

from llm_finetune_kit.plan.memory import MLP_WORKSPACE


def frozen_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a frozen layer as [in, out] in `dtype`; a packed one is unpacked and stands until the next one is."""
    if is_packed(base):
        from llm_finetune_kit.models.quantized_layers import passing_weight

        unpacked: torch.Tensor = passing_weight(base, dtype)
        return unpacked.T
    matrix: torch.Tensor = base.weight.to(dtype)
    return matrix if type(base) is Conv1D else matrix.T


def is_packed(base: Any) -> bool:
    """Whether the layer's weight is in 4 or 8 bits."""
    return not base.weight.is_floating_point()


class Part(NamedTuple):
    """What one layer computes: a frozen base, and an adapter where it has one (`down` [r, in] and `up` [out, r])."""

    base: Any
    bias: torch.Tensor | None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 0.0


class Readers(NamedTuple):
    """Layers of one input, as their products take them: with adapters in the dtype of products, None where there is none."""

    bases: list[Any]
    scales: list[float]
    downs: list[torch.Tensor | None]
    ups: list[torch.Tensor | None]

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """What autograd has to keep of them."""
        return self.downs + self.ups

    def with_tensors(self, kept: list[torch.Tensor | None]) -> Readers:
        """The same, from what autograd kept."""
        return self._replace(downs=kept[: len(self.bases)], ups=kept[len(self.bases) :])

    def joined(self) -> torch.Tensor | None:
        """All A in one matrix [R, in], made anew each time: kept, it would be a copy of trained weights."""
        return _joined([down for down in self.downs if down is not None], 0)

    def own(self, narrow: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Of columns [n, R] each layer's own, [n, r]."""
        widths = [0 if down is None else len(down) for down in self.downs]
        spans = zip(widths, accumulate(widths), strict=True)
        return [None if narrow is None or not width else narrow[:, end - width : end] for width, end in spans]


def readers(parts: Sequence[Part], dtype: torch.dtype) -> Readers:
    """The layers of one input with their adapters in `dtype`."""
    downs = [None if part.down is None else part.down.to(dtype) for part in parts]
    ups = [None if part.up is None else part.up.to(dtype) for part in parts]
    return Readers([part.base for part in parts], [part.scale for part in parts], downs, ups)


def _joined(tensors: list[torch.Tensor], axis: int) -> torch.Tensor | None:
    return None if not tensors else tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def outputs(
    rows: torch.Tensor, layers: Readers, biases: Sequence[torch.Tensor | None], shape: Sequence[int]
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """What each layer makes of rows [n, in], [*shape, out]; and what all their adapters read out of them, [n, R]."""
    joined = layers.joined()
    narrow = None if joined is None else rows @ joined.T
    found = []
    for base, bias, up, scale, own in zip(layers.bases, biases, layers.ups, layers.scales, layers.own(narrow), strict=True):
        weight = frozen_weight(base, rows.dtype)
        out = rows.new_empty(*shape, weight.shape[1])  # no view, so that models may change it in place
        flat = out.view(len(rows), -1)
        if bias is None:
            torch.mm(rows, weight, out=flat)
        else:
            torch.addmm(bias.to(rows.dtype), rows, weight, out=flat)
        if up is not None and own is not None:
            flat.addmm_(own, up.T, alpha=scale)
        found.append(out)
    return found, narrow


def narrow_slopes(slopes: Sequence[torch.Tensor], layers: Readers) -> torch.Tensor | None:
    """s dy B^T of all layers side by side, [n, R], from the slopes [n, out] of their outputs."""
    pairs = zip(slopes, layers.ups, layers.scales, strict=True)
    return _joined([(slope @ up).mul_(scale) for slope, up, scale in pairs if up is not None], 1)


def slope_of_rows(slopes: Sequence[torch.Tensor], narrow_slope: torch.Tensor | None, layers: Readers) -> torch.Tensor:
    """dx [n, in]: one tensor, to which each layer adds its part."""
    joined = layers.joined()
    total = None if narrow_slope is None or joined is None else narrow_slope @ joined
    for slope, base in zip(slopes, layers.bases, strict=True):
        back = frozen_weight(base, slope.dtype).T
        total = slope @ back if total is None else total.addmm_(slope, back)
    assert total is not None
    return total


def grads(
    rows: torch.Tensor | None,
    slopes: Sequence[torch.Tensor],
    narrow: torch.Tensor | None,
    narrow_slope: torch.Tensor | None,
    layers: Readers,
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of bias, down and up of each layer in turn, float32; `needed` says which of them are wanted."""
    downs = None if rows is None or narrow_slope is None else (narrow_slope.T @ rows).float()
    own_downs = layers.own(None if downs is None else downs.T)
    found: list[torch.Tensor | None] = []
    for place, (slope, own, own_down) in enumerate(zip(slopes, layers.own(narrow), own_downs, strict=True)):
        found.append(slope.sum(0, dtype=torch.float32) if needed[3 * place] else None)
        found.append(None if own_down is None else own_down.T)
        # this way only the narrow side is read against its grain
        found.append(None if own is None else (own.T @ slope).T.float().mul_(layers.scales[place]))
    return found


def _flat(parts: Sequence[Part]) -> list[torch.Tensor | None]:
    return [tensor for part in parts for tensor in (part.bias, part.down, part.up)]


class LoraProducts(torch.autograd.Function):
    """x [..., in] -> [..., out] of each layer, in `dtype`; the tensors are bias, down and up of each, in float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, parts: list[Part], dtype: torch.dtype, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        layers = readers(parts, dtype)
        found, narrow = outputs(rows, layers, tensors[::3], x.shape[:-1])
        ctx.save_for_backward(rows, narrow, *layers.tensors)
        ctx.layers, ctx.shape, ctx.dtype = layers.with_tensors([]), x.shape, x.dtype
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        rows, narrow, *kept = ctx.saved_tensors
        layers = ctx.layers.with_tensors(kept)
        slopes = [grad.reshape(len(rows), -1).to(rows.dtype) for grad in grad_outputs]
        narrow_slope = narrow_slopes(slopes, layers)
        found = grads(rows, slopes, narrow, narrow_slope, layers, ctx.needs_input_grad[3:])
        grad_x = slope_of_rows(slopes, narrow_slope, layers) if ctx.needs_input_grad[0] else None
        return (None if grad_x is None else grad_x.view(ctx.shape).to(ctx.dtype), None, None, *found)


def products(x: torch.Tensor, parts: list[Part], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What each of the layers makes of x [..., in], in `dtype`."""
    found: tuple[torch.Tensor, ...] = LoraProducts.apply(x, parts, dtype, *_flat(parts))
    return found


def plain_product(x: torch.Tensor, part: Part, dtype: torch.dtype) -> torch.Tensor:
    """What LoraProducts computes, in operations that a compiler can fuse and derive; for weights that are not packed."""
    assert part.down is not None and part.up is not None
    x, weight = x.to(dtype), frozen_weight(part.base, dtype)
    out = x @ weight if part.bias is None else x @ weight + part.bias.to(dtype)
    return out + part.scale * (x @ part.down.to(dtype).T @ part.up.to(dtype).T)


# --- a whole MLP ----------------------------------------------------------------------------------------------

BACK = torch.ops.aten
# An activation, and what writes the slope of its input over that input: (slope of the result, input, grad_input=input).
ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (silu, BACK.silu_backward.grad_input),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(BACK.gelu_backward.grad_input, approximate="tanh")),
    "gelu": (gelu, BACK.gelu_backward.grad_input),
}


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, [n, inner]."""
    return ACTIVATIONS[activation][0](gate).mul_(up)


def gated_slopes(
    slope: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slopes of `gate` and `up` under `slope`, that of their gated product, and that product once more; [n, inner] each.

    All three are written over the inputs, some rows at a time, so that what stands between stays small (and in a CPU's cache).
    """
    act, act_back = ACTIVATIONS[activation]
    rows = max(1, MLP_WORKSPACE[gate.device.type] // (2 * gate.shape[1] * gate.element_size()))
    for below, left, right in zip(slope.split(rows), gate.split(rows), up.split(rows), strict=True):
        open_share, from_right = act(left), below * right
        right.mul_(open_share)
        below.mul_(open_share)
        act_back(from_right, left, grad_input=left)
    return gate, slope, up


class Gating(NamedTuple):
    """How a gated product and its slopes are formed: `gated` and `gated_slopes`, or what computes the same."""

    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    slopes: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


GATINGS = {name: Gating(partial(gated, activation=name), partial(gated_slopes, activation=name)) for name in ACTIVATIONS}


class MlpProduct(torch.autograd.Function):
    """x [..., hidden] -> down(act(gate(x)) * up(x)) [..., hidden]; `parts` are of gate, up and down, in this order.

    x, gate, up and what the adapters read are kept. Backward writes over gate and up, so it runs once.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, parts: list[Part], gating: Gating, dtype: torch.dtype, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        first, last = readers(parts[:2], dtype), readers(parts[2:], dtype)
        (gate, up), narrow = outputs(rows, first, tensors[0:6:3], rows.shape[:1])
        (out,), last_narrow = outputs(gating.product(gate, up), last, tensors[6:7], x.shape[:-1])
        ctx.save_for_backward(None if narrow is None else rows, gate, up, narrow, last_narrow, *first.tensors, *last.tensors)
        ctx.layers = first.with_tensors([]), last.with_tensors([])
        ctx.gating, ctx.shape, ctx.dtype = gating, x.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        rows, gate, up, narrow, last_narrow, *kept = ctx.saved_tensors
        first, last = ctx.layers[0].with_tensors(kept[:4]), ctx.layers[1].with_tensors(kept[4:])
        needed = ctx.needs_input_grad[4:]
        slopes = [grad_outputs[0].reshape(len(gate), -1).to(gate.dtype)]
        narrow_slope = narrow_slopes(slopes, last)
        slope = slope_of_rows(slopes, narrow_slope, last)
        *wide, product = ctx.gating.slopes(slope, gate, up)
        of_last = grads(product, slopes, last_narrow, narrow_slope, last, needed[6:])
        narrow_slope = narrow_slopes(wide, first)
        of_first = grads(rows, wide, narrow, narrow_slope, first, needed[:6])
        grad_x = slope_of_rows(wide, narrow_slope, first) if ctx.needs_input_grad[0] else None
        return (None if grad_x is None else grad_x.view(ctx.shape).to(ctx.dtype), None, None, None, *of_first, *of_last)


def mlp_product(x: torch.Tensor, parts: list[Part], gating: Gating, dtype: torch.dtype) -> torch.Tensor:
    """What a gated MLP makes of x [..., hidden], in `dtype`; `parts` are of gate, up and down."""
    found: torch.Tensor = MlpProduct.apply(x, parts, gating, dtype, *_flat(parts))
    return found
