"""What a checkpoint holds, and putting it back: weights, optimizer, random state and progress.

Weights stand in the layout of PEFT or transformers, so other tools load a checkpoint as it is; the rest is
safetensors and JSON. Nothing is ever pickled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.folder import fault, read_json, write_json
from llm_finetune_kit.models.adapters import restore_adapter, save_adapter
from llm_finetune_kit.models.loading import no_bars
from llm_finetune_kit.training.optimizer import restore_state, state_tensors
from llm_finetune_kit.training.scaling import LossScale

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
FORMAT = 1  # of trainer_state.json


@dataclass
class Progress:
    """Where a run stands, at an optimizer-step boundary."""

    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    stale_evaluations: int = 0
    seconds: float = 0.0
    loss_scale: LossScale | None = None  # with float16


def save_weights(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """The trained weights in PEFT's layout, or the whole model in transformers' (in `dtype` if given)."""
    if hasattr(model, "peft_config"):
        save_adapter(model, folder)
        return
    state = model.state_dict()
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with no_bars():
        model.save_pretrained(folder, state_dict=state, max_shard_size="100GB")
    if dtype is not None:  # transformers notes the dtype in memory, not that of the file
        path = folder / "config.json"
        write_json(path, read_json(path) | {"dtype": str(dtype).removeprefix("torch.")})


def save(model: Any, optimizer: torch.optim.Optimizer, progress: Progress, folder: Path) -> None:
    """Write everything that a bit-exact resume needs into an empty folder."""
    save_weights(model, folder)
    save_file(state_tensors(optimizer, _trained(model)) | _random_tensors(), folder / OPTIMIZER)
    write_json(folder / STATE, {"format": FORMAT, **asdict(progress)})


def restore(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> Progress:
    """Put a checkpoint back into the model and the optimizer, and the random state too."""
    restore_weights(model, folder)
    tensors = load_file(folder / OPTIMIZER)
    restore_state(optimizer, _trained(model), tensors)
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    state = read_json(folder / STATE)
    state.pop("format")
    if state.get("loss_scale") is not None:
        state["loss_scale"] = LossScale(**state["loss_scale"])
    return Progress(**state)


@torch.no_grad()
def restore_weights(model: Any, folder: Path) -> None:
    """Put only the weights of a checkpoint back. Raises ModelError if they belong to another model."""
    if hasattr(model, "peft_config"):
        restore_adapter(model, folder)
        return
    state = load_file(folder / "model.safetensors")
    outcome = model.load_state_dict(state, strict=False)
    loaded = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in state}
    named = dict(model.named_parameters(remove_duplicate=False))
    wrong = [name for name in outcome.missing_keys if name in named and id(named[name]) not in loaded]
    if wrong:
        raise ModelError(
            20, f"does not fit this model: {wrong[0]}", where=str(folder), fix="resume the run with its own base model"
        )


def newest_good(folders: list[Path]) -> tuple[Path | None, list[str]]:
    """The first folder that verifies, and why each one before it was passed over."""
    passed: list[str] = []
    for folder in folders:
        reason = fault(folder)
        if reason is None:
            return folder, passed
        passed.append(f"{folder.name} {reason}")
    return None, passed


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _random_tensors() -> dict[str, torch.Tensor]:
    tensors = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors
