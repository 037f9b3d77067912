"""Liger's kernels for what a GPU computes between matrix products, each in one go: RMSNorm, rotary positions, gated products.

Only single operations of `liger_kernel.ops` are used; loss, attention and adapters stay this package's own. How a model rounds in
its norms and how it turns queries and keys is found from what they make of random values, never from a name, and what is of
another kind stays as it is. Forwards are replaced in one model's modules; nothing that other models share changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.func import functional_call

from llm_finetune_kit.models.products import GATINGS, Gating
from llm_finetune_kit.models.together import whole_mlp

ROTATION = "apply_rotary_pos_emb"  # transformers' name for it in its models' files
PROBED = 16  # rows of random values that a norm is known by


@dataclass(frozen=True)
class NormKind:
    """What an RMSNorm multiplies with: weight + `offset`; `casting`, Liger's word, says in which number format."""

    casting: str
    offset: float


@dataclass(frozen=True)
class Kernels:
    """Operations with gradients: norm(x, weight, eps, kind) gives what x is like; turn(q, k, cos, sin) gives both turned.

    `gating` is that of SiLU; without it MLPs stay as they are.
    """

    norm: Callable[[torch.Tensor, torch.Tensor, float, NormKind], torch.Tensor]
    turn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    gating: Gating | None = None


def load_kernels() -> Kernels:
    """Liger's. Raises ImportError where liger-kernel or triton is not there.

    A norm's gradient gets memory of its own: in place it would spoil what a residual connection hands on too. The turn happens
    in the memory of q and k, which nothing else reads, and its gradient in that of theirs.
    """
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind) -> torch.Tensor:
        made: torch.Tensor = LigerRMSNormFunction.apply(x, weight, eps, kind.offset, kind.casting, False)
        return made

    return Kernels(norm, LigerRopeFunction.apply, Gating(gated, gated_slopes))


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up by Liger's kernel; both [n, inner], contiguous and of one number format."""
    from liger_kernel.ops.swiglu import swiglu_forward

    made: torch.Tensor = swiglu_forward(gate, up)[2]
    return made


def gated_slopes(slope: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slopes of `gate` and `up` under `slope`, that of their gated product, written over them; and that product once more."""
    from liger_kernel.ops.swiglu import swiglu_backward

    product = gated(gate, up)
    return (*swiglu_backward(gate, up, slope), product)


def use_kernels(model: Any, kernels: Kernels) -> list[tuple[Any, Any]]:
    """Have a model's norms, rotary positions and fused MLPs use `kernels`; the modules, each with what was put on it before."""
    replaced = []
    for module in model.modules():
        forward = _norm_forward(module, kernels) or _attention_forward(module, kernels) or _mlp_forward(module, kernels)
        if forward is not None:
            replaced.append((module, vars(module).get("forward")))
            module.forward = forward
    return replaced


def forget_kernels(replaced: list[tuple[Any, Any]]) -> None:
    """Undo `use_kernels`, which gave `replaced`."""
    for module, before in replaced:
        del module.forward
        if before is not None:
            module.forward = before


def _norm_forward(module: Any, kernels: Kernels) -> Callable[..., torch.Tensor] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weights = dict(module.named_parameters())
    if not isinstance(eps, float) or list(weights) != ["weight"] or weights["weight"].dim() != 1:
        return None
    kind = norm_kind(module, eps)
    return None if kind is None else partial(_normed, module, module.forward, kernels, eps, kind)


def _normed(module: Any, plain: Any, kernels: Kernels, eps: float, kind: NormKind, x: torch.Tensor) -> torch.Tensor:
    """Under autocast a norm in float32 may get 16 bits, and which format comes out is then the module's to say."""
    alike = x.dtype == module.weight.dtype
    made: torch.Tensor = kernels.norm(x, module.weight, eps, kind) if alike else plain(x)
    return made


@torch.no_grad()
def norm_kind(module: Any, eps: float) -> NormKind | None:
    """Which RMSNorm a module is, to the bit, or None: where it rounds, and whether its weight is counted from 0 or from 1."""
    weight = module.weight
    dice = torch.Generator().manual_seed(0)
    x, probe = (torch.randn(*rows, len(weight), generator=dice).to(weight.device, torch.bfloat16) for rows in ((PROBED,), ()))
    try:
        made = functional_call(module, {"weight": probe}, (x,))
    except Exception:  # it takes more than one tensor, or is something else altogether
        return None
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    kinds = {
        NormKind("llama", 0.0): probe * normal.bfloat16(),
        NormKind("gemma", 0.0): (normal * probe.float()).bfloat16(),
        NormKind("gemma", 1.0): (normal * (1.0 + probe.float())).bfloat16(),
    }
    return next((kind for kind, values in kinds.items() if torch.equal(made, values)), None)


def _attention_forward(module: Any, kernels: Kernels) -> Callable[..., Any] | None:
    """The forward of an attention that calls transformers' function by its name, which then means the kernel.

    What was put around its own forward stays around it.
    """
    forward, now = type(module).forward, module.forward
    known = getattr(forward, "__globals__", {}).get(ROTATION)
    if known is None or ROTATION not in forward.__code__.co_names or not turns_halves(known):
        return None
    names = forward.__globals__ | {ROTATION: partial(_turned, known, kernels)}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    own, turned = MethodType(forward, module), MethodType(made, module)
    if now == own:
        return turned
    inside = isinstance(now, partial) and own in now.args
    return partial(now.func, *(turned if part == own else part for part in now.args), **now.keywords) if inside else None


def _turned(plain: Any, kernels: Kernels, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """The kernel computes in the format of cos and sin, so a wider q stays with transformers."""
    if torch.promote_types(q.dtype, cos.dtype) != cos.dtype or q.dtype != k.dtype:
        return plain(q, k, cos, sin)
    return kernels.turn(q, k, cos, sin)


@torch.no_grad()
def turns_halves(function: Any) -> bool:
    """Whether a function turns the first half of each head [1, heads, T, d] against the second; others turn neighbours."""
    dice = torch.Generator().manual_seed(0)
    q, k, angles = (torch.randn(shape, generator=dice) for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 4)))
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    try:
        made = function(q, k, cos, sin)
    except Exception:  # it takes other things
        return False
    return all(torch.allclose(ours, half_turn(part, cos, sin)) for ours, part in zip(made, (q, k), strict=True))


def half_turn(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(a, b) becomes (a cos - b sin, b cos + a sin), a and b being the halves of each head; part [1, heads, T, d]."""
    a, b = part.chunk(2, dim=-1)
    return part * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def _mlp_forward(module: Any, kernels: Kernels) -> Callable[..., torch.Tensor] | None:
    """That of an MLP which is computed as one function, where its activation is SiLU."""
    now = module.forward
    if kernels.gating is None or not (isinstance(now, partial) and now.func is whole_mlp and now.args[2] is GATINGS["silu"]):
        return None
    mlp, plain, _ = now.args
    return partial(whole_mlp, mlp, plain, kernels.gating)
