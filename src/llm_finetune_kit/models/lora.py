"""LoRA layers that compute base and adapter in one go, with a backward written from the mathematics.

    y  = x W + b + s (x A) B          (A [in, r], B [r, out]: transposes of PEFT's lora_A and lora_B)
    dB = s (x A)^T dy,  dA = s x^T (dy B^T),  dx = dy W^T + s (dy B^T) A^T

The adapter's product is added in place, so nothing as wide as y is written but y itself. PEFT's own layers are
subclassed, so adapters are saved and loaded as ever; whatever the fast path does not cover (dropout at work,
several adapters, variants, an adapter that is switched off or merged) goes to PEFT's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from transformers.pytorch_utils import Conv1D


class LoraProduct(torch.autograd.Function):
    """x [..., in] -> [..., out]; `weight` is frozen, [in, out]; `down` is [r, in] and `up` [out, r] in float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        dtype = weight.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        down, up = down.to(dtype), up.to(dtype)
        narrow = rows @ down.T
        out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        out.addmm_(narrow, up.T, alpha=scale)
        ctx.save_for_backward(rows, weight, down, up, narrow)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        rows, weight, down, up, narrow = ctx.saved_tensors
        slope = grad_outputs[0].reshape(-1, weight.shape[1]).to(weight.dtype)
        narrow_slope = (slope @ up).mul_(ctx.scale)
        grad_up = (narrow.T @ slope).T.float().mul_(ctx.scale)  # this way only the narrow side is read against its grain
        grad_down = (narrow_slope.T @ rows).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm(narrow_slope @ down, slope, weight.T).view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, grad_down, grad_up, None


class FastLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA over nn.Linear, fused where that is possible."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self._can_be_fused(x):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        base, name = self.get_base_layer(), self.active_adapters[0]
        weight = base.weight if self.is_target_conv_1d_layer else base.weight.T
        fused: torch.Tensor = LoraProduct.apply(
            x, weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return fused

    def _can_be_fused(self, x: torch.Tensor) -> bool:
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        base, name = self.get_base_layer(), names[0]
        computed_in = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return (
            type(base) in (torch.nn.Linear, Conv1D)
            and base.weight.dtype is computed_in
            and not base.weight.requires_grad
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and not (self.training and getattr(self.lora_dropout[name], "p", 0))
        )


class FastConv1D(FastLinear):
    """The same over GPT-2's Conv1D, whose weight is stored as [in, out]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, is_target_conv_1d_layer=True, **kwargs)


FAST_LAYERS = {torch.nn.Linear: FastLinear, Conv1D: FastConv1D}
