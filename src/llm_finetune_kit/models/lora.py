"""LoRA layers that compute base and adapter in one go, with a backward written from the mathematics.

    y  = x W + b + s (x A) B          (A [in, r], B [r, out]: transposes of PEFT's lora_A and lora_B)
    dB = s (x A)^T dy,  dA = s x^T (dy B^T),  dx = dy W^T + s (dy B^T) A^T,  db = sum of dy

The adapter's product is added in place, so nothing as wide as y is written but y itself. A W in 4 or 8 bits is
unpacked once forward and once backward, into memory that all layers share. PEFT's own layers are subclassed, so adapters are
saved and loaded as ever; what the fast path does not cover (dropout at work, several adapters, an adapter that is off or merged)
is PEFT's. Where blocks are compiled, the compiler gets the formula and derives it itself.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from transformers.pytorch_utils import Conv1D


def frozen_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a frozen layer as [in, out] in `dtype`; a packed one is unpacked and stands until the next one is."""
    if _packed(base):
        from llm_finetune_kit.models.quantized_layers import passing_weight

        unpacked: torch.Tensor = passing_weight(base, dtype)
        return unpacked.T
    matrix: torch.Tensor = base.weight.to(dtype)
    return matrix if type(base) is Conv1D else matrix.T


def _packed(base: Any) -> bool:
    return not base.weight.is_floating_point()


class LoraProduct(torch.autograd.Function):
    """x [..., in] -> [..., out] in `dtype`; `base` is frozen but for its bias; `down` is [r, in], `up` [out, r], in float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        base: Any,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        down, up = down.to(dtype), up.to(dtype)
        narrow = rows @ down.T
        weight = frozen_weight(base, dtype)
        out = rows @ weight if bias is None else torch.addmm(bias.to(dtype), rows, weight)
        out.addmm_(narrow, up.T, alpha=scale)
        ctx.save_for_backward(rows, down, up, narrow)
        ctx.base, ctx.scale, ctx.shape, ctx.dtype = base, scale, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        rows, down, up, narrow = ctx.saved_tensors
        slope = grad_outputs[0].reshape(-1, len(up)).to(rows.dtype)
        narrow_slope = (slope @ up).mul_(ctx.scale)
        grad_up = (narrow.T @ slope).T.float().mul_(ctx.scale)  # this way only the narrow side is read against its grain
        grad_down = (narrow_slope.T @ rows).float()
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = frozen_weight(ctx.base, rows.dtype)
            grad_x = torch.addmm(narrow_slope @ down, slope, weight.T).view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = slope.sum(0, dtype=torch.float32)
        return grad_x, None, grad_bias, grad_down, grad_up, None, None


def plain_product(
    x: torch.Tensor, base: Any, down: torch.Tensor, up: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """What LoraProduct computes, in operations that a compiler can fuse and derive; for weights that are not packed."""
    x, weight = x.to(dtype), frozen_weight(base, dtype)
    out = x @ weight if base.bias is None else x @ weight + base.bias.to(dtype)
    return out + scale * (x @ down.to(dtype).T @ up.to(dtype).T)


class Fused:
    """Put before one of PEFT's LoRA layers: the fast path, and what PiSSA takes off.

    PiSSA starts A and B at the main part of W. PEFT takes that part out of W; here W stays as it is and the part
    is subtracted as a second, frozen adapter: the sum is the same, W is exact in every dtype (4-bit too), and
    switching the adapter off gives the base.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("first_down", None, persistent=False)  # type: ignore[attr-defined]
        self.register_buffer("first_up", None, persistent=False)  # type: ignore[attr-defined]
        self._base_norms: torch.Tensor | None = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if args or kwargs or not self._can_be_fused(dtype):
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result if self.first_down is None or self.disable_adapters or self.merged else result - self._first(x)
        base, name = self.get_base_layer(), self.active_adapters[0]
        down, up, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        if name in self.lora_variant:
            product = LoraProduct.apply(x, base, None, down, up, scale, dtype)
            factor = self.lora_magnitude_vector[name].weight / self._norms(base, down, up, scale, dtype)
            sized: torch.Tensor = product * factor.to(dtype)
            return sized if base.bias is None else sized + base.bias.to(dtype)
        if self.first_down is not None:
            down, up = torch.cat([down, self.first_down]), torch.cat([up, -self.first_up], dim=1)
        if torch.compiler.is_compiling() and not _packed(base):
            return plain_product(x, base, down, up, scale, dtype)
        fused: torch.Tensor = LoraProduct.apply(x, base, base.bias, down, up, scale, dtype)
        return fused

    def _can_be_fused(self: Any, dtype: torch.dtype) -> bool:
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        base, name = self.get_base_layer(), names[0]
        return (
            (base.weight.dtype is dtype or _packed(base))
            and not base.weight.requires_grad
            and isinstance(self.lora_variant.get(name), DoraLinearVariant | None)
            and not self.lora_bias[name]
            and not (self.training and getattr(self.lora_dropout[name], "p", 0))
        )

    @torch.no_grad()
    def _norms(self: Any, base: Any, down: torch.Tensor, up: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """The length of each output's column of W + s A B, in float32, without that sum ever being written."""
        weight = frozen_weight(base, dtype)
        if self._base_norms is None or self._base_norms.device != weight.device:
            self._base_norms = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        crossed = (up.T * (down.to(dtype) @ weight).float()).sum(0)
        added = (up @ (down @ down.T) * up).sum(1)
        norms: torch.Tensor = (self._base_norms.square() + 2 * scale * crossed + scale**2 * added).clamp_min(1e-12).sqrt()
        return norms

    def _first(self: Any, x: torch.Tensor) -> torch.Tensor:
        narrow = x.to(self.first_down.dtype) @ self.first_down.T
        taken = narrow @ self.first_up.T * self.scaling[self.active_adapters[0]]
        rounded: torch.Tensor = taken.to(x.dtype)
        return rounded

    def get_delta_weight(self: Any, adapter: str) -> torch.Tensor:
        """What merging adds to W, in its layout."""
        delta: torch.Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        if self.first_down is None:
            return delta
        taken = self.scaling[adapter] * self.first_up @ self.first_down
        left: torch.Tensor = delta - (taken.T if self.fan_in_fan_out else taken).to(delta.dtype)
        return left

    @torch.no_grad()
    def start_at_the_main_part(self: Any, name: str) -> None:
        """PiSSA (Meng et al. 2024): A and B start as W's r largest singular directions, of which it must have so many."""
        weight, r = frozen_weight(self.get_base_layer(), torch.float32), self.r[name]
        left, values, right = torch.svd_lowrank(weight, q=min(2 * r, *weight.shape), niter=4)
        roots = (values[:r] / self.scaling[name]).sqrt()
        self.set_first((left[:, :r] * roots).T.contiguous(), (right[:, :r] * roots).contiguous())
        self.lora_A[name].weight.copy_(self.first_down)
        self.lora_B[name].weight.copy_(self.first_up)

    def set_first(self: Any, down: torch.Tensor, up: torch.Tensor) -> None:
        """What PiSSA started from, `down` [r, in] and `up` [out, r]."""
        device = self.get_base_layer().weight.device
        self.first_down, self.first_up = down.to(device), up.to(device)


class FastLinear(Fused, lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA over nn.Linear, fused where that is possible."""


class FastConv1D(FastLinear):
    """The same over GPT-2's Conv1D, whose weight is stored as [in, out]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, is_target_conv_1d_layer=True, **kwargs)


def fast_layers() -> dict[type, type]:
    """Which layer takes the place of which; those of bitsandbytes first, as they are nn.Linear too."""
    layers: dict[type, type] = {torch.nn.Linear: FastLinear, Conv1D: FastConv1D}
    if sys.modules.get("bitsandbytes") is None:
        return layers
    import bitsandbytes.nn
    from peft.tuners.lora import bnb

    packed: Any = bitsandbytes.nn

    class Fast4bit(Fused, bnb.Linear4bit):  # type: ignore[misc]
        """PEFT's LoRA over 4-bit weights, fused where that is possible."""

    class Fast8bit(Fused, bnb.Linear8bitLt):  # type: ignore[misc]
        """The same over 8-bit weights."""

    return {packed.Linear4bit: Fast4bit, packed.Linear8bitLt: Fast8bit, **layers}
