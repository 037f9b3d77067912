"""Linear layers whose frozen weights stand packed in 4 or 8 bits, with one result in training and in evaluation.

bitsandbytes packs and unpacks. Its own products are not used for 4 bits on a CPU: in evaluation they pack the weights anew,
in place, and from then on hand no gradient back in training. Nor are they for int8 anywhere: they round activations too, and
which of them they spare depends on the other rows of the batch, so a document would not come out as it does alone.
"""

from __future__ import annotations

import threading
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit

ROWS = 64  # unpacked at once, so that the float32 between stays in the cache: six times as fast on a CPU


IN_PLACE = {"cuda"}  # devices on which bitsandbytes unpacks 4 bits into a tensor it is given
_THREAD = threading.local()  # on a GPU, torch computes gradients in a thread of their own


def plain_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of a packed layer, in a new tensor of `dtype`."""
    return _unpacked(layer, dtype, None)


def passing_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The same, for a product that is started at once: it stands until this thread asks for the next one.

    A model's layers then share one piece of memory. On a GPU, whose stream computes in order, the product has read the
    weight before the next is written over it.
    """
    shape = layer.weight.quant_state.shape if isinstance(layer, bitsandbytes.nn.Linear4bit) else layer.weight.shape
    return _unpacked(layer, dtype, _room(torch.Size(shape), dtype, layer.weight.device))


def _room(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of this thread, as large as the largest weight so far."""
    rooms: dict[tuple[torch.dtype, torch.device], torch.Tensor] = _THREAD.__dict__.setdefault("rooms", {})
    known = (dtype, device)
    if known not in rooms or rooms[known].numel() < shape.numel():
        rooms.pop(known, None)  # gives it back first
        rooms[known] = torch.empty(shape.numel(), dtype=dtype, device=device)
    return rooms[known][: shape.numel()].view(shape)


def _unpacked(layer: Any, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    packed: torch.Tensor = layer.weight.data
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        state = layer.weight.quant_state
        fits = out is not None and state.dtype == dtype and packed.device.type in IN_PLACE
        unpacked: torch.Tensor = dequantize_4bit(packed, state, out=out if fits else None).to(dtype)
        return unpacked
    scales = ((layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB) / 127.0).unsqueeze(1)
    weight = torch.empty(packed.shape, dtype=dtype, device=packed.device) if out is None else out
    if packed.device.type != "cpu":
        return torch.mul(packed, scales, out=weight)
    for start in range(0, len(packed), ROWS):
        part = slice(start, start + ROWS)
        weight[part] = packed[part].float().mul_(scales[part])
    return weight


class FrozenProduct(torch.autograd.Function):
    """x [..., in] -> x W^T + b [..., out]. Nothing is kept for backward: the weight is unpacked once more there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[override]
        ctx.layer, ctx.given = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x.to(dtype), passing_weight(layer, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        slope = grad_outputs[0]
        return (slope @ passing_weight(ctx.layer, slope.dtype)).to(ctx.given), None, None


def product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's product in the number format that ordinary layers would use here."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    result: torch.Tensor = FrozenProduct.apply(x, layer, dtype)
    return result


class Frozen4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' layer; on a CPU with the product above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(self, x) if x.device.type == "cpu" else super().forward(x)


class Frozen8bit(bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' layer with the product above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(self, x)


def freeze_quantized(model: Any) -> Any:
    """The model with all its packed layers of the classes above, and no weight to be trained."""
    for module in model.modules():
        if type(module) is bitsandbytes.nn.Linear4bit:
            module.__class__ = Frozen4bit
        elif type(module) is bitsandbytes.nn.Linear8bitLt:
            module.__class__ = Frozen8bit
    return model.requires_grad_(False)
