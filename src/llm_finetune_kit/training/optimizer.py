"""AdamW over the trained weights in four kinds, its state for checkpoints, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from llm_finetune_kit.errors import MachineError
from llm_finetune_kit.plan.contradictions import refuse_optimizer

Named = tuple[str, torch.nn.Parameter]


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter] | Iterable[Named],
    weight_decay: float,
    *,
    kind: str = "adamw",
    plus_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999, epsilon 1e-8); matrices decay, biases and norms do not.

    Each group's rate is the step's rate times the group's `rate_factor`: `plus_ratio` for the B matrices of LoRA
    (LoRA+, Hayou et al. 2024; needs `model.named_parameters()`), else 1. The 8-bit kinds keep two bytes of state a
    weight instead of eight. Raises MachineError for a kind that this machine cannot run.
    """
    named = [part if isinstance(part, tuple) else ("", part) for part in parameters]
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            factor = plus_ratio if plus_ratio is not None and ".lora_B." in name else 1.0
            groups.setdefault((weight_decay if parameter.ndim > 1 else 0.0, factor), []).append(parameter)
    settings = [
        {"params": members, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), members in sorted(groups.items(), key=lambda group: (-group[0][0], group[0][1]))
    ]
    if kind == "adamw":
        return torch.optim.AdamW(settings, lr=0.0, fused=True)
    return _from_bitsandbytes(kind, settings, settings[0]["params"][0].device.type)  # type: ignore[index]


def _from_bitsandbytes(kind: str, groups: list[dict[str, Any]], device: str) -> torch.optim.Optimizer:
    refuse_optimizer(kind, device)
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise MachineError(
            61,
            f"the optimizer {kind} needs the package bitsandbytes",
            where="training.optimizer",
            fix="pip install 'llm-finetune-kit[quantization]', or set training.optimizer=adamw",
        ) from error
    library: Any = bitsandbytes.optim
    bits = 8 if kind.endswith("8bit") else 32
    made: torch.optim.Optimizer = library.AdamW(groups, lr=0.0, optim_bits=bits, is_paged=kind.startswith("paged"))
    return made


def state_tensors(optimizer: torch.optim.Optimizer, named: Iterable[Named]) -> dict[str, torch.Tensor]:
    """The optimizer's state as `{key}/{parameter name}`, on the CPU; its code books are left out, being constants."""
    return {
        f"{key}/{name}": value.detach().cpu().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
        if not key.startswith("qmap")
    }


@torch.no_grad()
def restore_state(optimizer: torch.optim.Optimizer, named: Iterable[Named], tensors: dict[str, torch.Tensor]) -> None:
    """Put what `state_tensors` gave back; a parameter that had no state then gets none."""
    places = {
        id(parameter): (group, index, place)
        for index, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
    }
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for label, tensor in tensors.items():
        key, _, name = label.partition("/")
        stored.setdefault(name, {})[key] = tensor
    for name, parameter in named:
        kept = stored.get(name)
        if kept is None:
            optimizer.state.pop(parameter, None)
        elif hasattr(optimizer, "init_state"):  # bitsandbytes': it makes its own buffers, paged ones too
            group, index, place = places[id(parameter)]
            optimizer.init_state(group, parameter, index, place)
            for key, tensor in kept.items():
                if key == "step":
                    optimizer.state[parameter][key] = int(tensor)
                else:
                    optimizer.state[parameter][key].copy_(tensor)
        else:
            optimizer.state[parameter] = {
                key: tensor.clone() if key == "step" and not parameter.is_cuda else tensor.to(parameter.device, copy=True)
                for key, tensor in kept.items()
            }


def learning_rates(schedule: str, steps: int, peak: float, warmup: int) -> list[float]:
    """The learning rate of every step, as a list to print, plot and test.

    It rises linearly over `warmup` steps (the first step already learns), then follows the schedule: half a
    cosine or a line from the peak down to 0, or stays constant.
    """
    shapes = {
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "linear": lambda done: 1 - done,
        "constant": lambda done: 1.0,
    }
    shape = shapes[schedule]
    rest = max(1, steps - warmup)
    return [peak * ((step + 1) / warmup if step < warmup else shape((step - warmup) / rest)) for step in range(steps)]
