"""Linear layers whose frozen weights stand packed in 4 or 8 bits, with one result in training and in evaluation.

bitsandbytes packs and unpacks. Its own products are not used for 4 bits on a CPU: in evaluation they pack the weights anew,
in place, and from then on hand no gradient back in training. Nor are they for int8 anywhere: they round activations too, and
which of them they spare depends on the other rows of the batch, so a document would not come out as it does alone.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit

ROWS = 64  # unpacked at once, so that the float32 between stays in the cache: six times as fast on a CPU


def plain_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of a packed layer, in a new tensor of `dtype`."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        unpacked: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        return unpacked
    packed: torch.Tensor = layer.weight.data
    scales = ((layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB) / 127.0).unsqueeze(1)
    if packed.device.type != "cpu":
        scaled: torch.Tensor = (packed * scales).to(dtype)
        return scaled
    weight = torch.empty(packed.shape, dtype=dtype)
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
            return torch.nn.functional.linear(x.to(dtype), plain_weight(layer, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        slope = grad_outputs[0]
        return (slope @ plain_weight(ctx.layer, slope.dtype)).to(ctx.given), None, None


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
