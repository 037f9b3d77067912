"""PEFT's LoRA layers with one fast product for base and adapter (`products`).

They are subclassed, so adapters are saved and loaded as ever; what the fast path does not cover (dropout at work,
several adapters, an adapter that is off or merged) is PEFT's. Where blocks are compiled, the compiler gets the formula and
derives it itself.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from transformers.pytorch_utils import Conv1D

from llm_finetune_kit.models.products import Part, frozen_weight, is_packed, plain_product, products


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What products of `x` are computed in here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_frozen(base: Any, dtype: torch.dtype) -> bool:
    """Whether the base's weight stays as it is, and stands in `dtype` or packed."""
    return (base.weight.dtype is dtype or is_packed(base)) and not base.weight.requires_grad


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
        dtype = product_dtype(x)
        if args or kwargs or not self._can_be_fused(dtype):
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result if self.first_down is None or self.disable_adapters or self.merged else result - self._first(x)
        part = self._part()
        if self.active_adapters[0] in self.lora_variant:
            sized: torch.Tensor = self._sized(x, part, dtype)
            return sized
        if torch.compiler.is_compiling() and not is_packed(part.base):
            return plain_product(x, part, dtype)
        return products(x, [part], dtype)[0]

    def part(self: Any, dtype: torch.dtype) -> Part | None:
        """What its product is made of, for one of several layers; None where it must be computed by itself."""
        if not self._can_be_fused(dtype) or self.active_adapters[0] in self.lora_variant:
            return None
        whole: Part = self._part()
        return whole

    def _part(self: Any) -> Part:
        base, name = self.get_base_layer(), self.active_adapters[0]
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if self.first_down is not None:
            down, up = torch.cat([down, self.first_down]), torch.cat([up, -self.first_up], dim=1)
        return Part(base, base.bias, down, up, self.scaling[name])

    def _can_be_fused(self: Any, dtype: torch.dtype) -> bool:
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        name = names[0]
        return (
            is_frozen(self.get_base_layer(), dtype)
            and isinstance(self.lora_variant.get(name), DoraLinearVariant | None)
            and not self.lora_bias[name]
            and not (self.training and getattr(self.lora_dropout[name], "p", 0))
        )

    def _sized(self: Any, x: torch.Tensor, part: Part, dtype: torch.dtype) -> torch.Tensor:
        """DoRA (Liu et al. 2024): each output at its own trained length."""
        product = products(x, [part._replace(bias=None)], dtype)[0]
        factor = self.lora_magnitude_vector[self.active_adapters[0]].weight / self._norms(part, dtype)
        sized: torch.Tensor = product * factor.to(dtype)
        return sized if part.bias is None else sized + part.bias.to(dtype)

    @torch.no_grad()
    def _norms(self: Any, part: Part, dtype: torch.dtype) -> torch.Tensor:
        """The length of each output's column of W + s A B, in float32, without that sum ever being written."""
        base, _, down, up, scale = part
        assert down is not None and up is not None
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
