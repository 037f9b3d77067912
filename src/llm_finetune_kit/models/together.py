"""Layers of a block that are computed together: queries, keys and values out of one reading of their input; a whole MLP.

Put on once, over forwards of transformers' own modules; whatever cannot be fused at the moment goes their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from llm_finetune_kit.models.lora import Fused, is_frozen, product_dtype
from llm_finetune_kit.models.products import ACTIVATIONS, GATINGS, Gating, Part, mlp_product, products

READERS = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ACTIVATION = "act_fn"


def fuse_blocks(model: Any) -> None:
    """Have the layers of an adapted model's attentions and MLPs computed together where that is known to be the same."""
    known: dict[type, str | None] = {}
    for module in list(model.modules()):
        children = dict(module.named_children())
        readers = [children.get(name) for name in READERS]
        if _linear(readers) and any(isinstance(layer, Fused) for layer in readers):
            Together(module).put_on()
        elif children.keys() == {*MLP, ACTIVATION} and _linear([children[name] for name in MLP]):
            if type(module) not in known:  # the blocks of a model are alike
                known[type(module)] = _whole_activation(module)
            activation = known[type(module)]
            if activation is not None:
                module.forward = partial(whole_mlp, module, module.forward, GATINGS[activation])


def _linear(layers: Sequence[Any]) -> bool:
    """Whether all are linear layers, adapted or not."""
    return all(isinstance(layer, Fused | torch.nn.Linear) for layer in layers)


def _parts(layers: Sequence[Any], dtype: torch.dtype) -> list[Part] | None:
    """What the layers' products are made of; None if one of them must be computed by itself."""
    found = [_part(layer, dtype) for layer in layers]
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(found) else None


def _part(layer: Any, dtype: torch.dtype) -> Part | None:
    if isinstance(layer, Fused):
        return layer.part(dtype)
    return Part(layer, layer.bias) if is_frozen(layer, dtype) else None


def _learning() -> bool:
    """Whether a gradient is wanted, and no compiler looks on, which derives it itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


# --- layers of one input --------------------------------------------------------------------------------------


class Together:
    """Queries, keys and values of an attention: when the first is asked for, all are computed, and wait until they are asked for.

    They wait for the same tensor only, and no longer than its forward lasts, however that ends.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.open = False
        self.given: torch.Tensor | None = None
        self.waiting: dict[str, torch.Tensor] = {}

    def put_on(self) -> None:
        """Stand before the forwards of the attention and of its layers."""
        for name in READERS:
            layer = getattr(self.attention, name)
            layer.forward = partial(self.answer, name, layer.forward)
        self.attention.forward = partial(self.within, self.attention.forward)

    def within(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The attention's forward."""
        if not _learning():
            return forward(*args, **kwargs)
        self.open = True
        try:
            return forward(*args, **kwargs)
        finally:
            self.open, self.given, self.waiting = False, None, {}

    def answer(self, name: str, forward: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A layer's forward."""
        if not self.open or args or kwargs:
            return forward(x, *args, **kwargs)
        if name == READERS[0]:
            self._compute(x)
        if x is self.given and name in self.waiting:
            return self.waiting.pop(name)
        return forward(x)

    def _compute(self, x: torch.Tensor) -> None:
        dtype = product_dtype(x)
        parts = _parts([getattr(self.attention, name) for name in READERS], dtype)
        if parts is not None:
            self.given, self.waiting = x, dict(zip(READERS, products(x, parts, dtype), strict=True))


# --- MLPs -----------------------------------------------------------------------------------------------------


def whole_mlp(mlp: Any, plain: Callable[..., torch.Tensor], gating: Gating, x: torch.Tensor) -> torch.Tensor:
    """The forward of a fused MLP; `plain` is its own."""
    dtype = product_dtype(x)
    parts = _parts([getattr(mlp, name) for name in MLP], dtype) if _learning() else None
    return plain(x) if parts is None else mlp_product(x, parts, gating, dtype)


@torch.no_grad()
def _whole_activation(mlp: Any) -> str | None:
    """The name of the MLP's activation, if it computes down(act(gate(x)) * up(x)) with a known one; tried, not assumed."""
    weight = mlp.gate_proj.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    numbers = torch.linspace(-6, 6, 49, device=weight.device)
    rows = torch.linspace(-1, 1, 2 * mlp.gate_proj.in_features, device=weight.device, dtype=dtype).view(2, -1)
    parts = _parts([getattr(mlp, name) for name in MLP], dtype)
    if parts is None:
        return None
    right, plain = mlp.act_fn(numbers), mlp(rows).float()
    for name, (act, _) in ACTIVATIONS.items():
        if torch.allclose(act(numbers), right, atol=1e-6):
            off = mlp_product(rows, parts, GATINGS[name], dtype).float() - plain
            return name if off.norm() <= 0.02 * plain.norm() else None
    return None
