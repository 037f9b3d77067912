"""What a checkpoint holds, and putting it back: weights, optimizer, random state and progress.

Weights stand in the layout of PEFT or transformers, so other tools load a checkpoint as it is; the rest is
safetensors and JSON. Nothing is ever pickled.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.files import MANIFEST, about_to, damage, read_json, write_json
from llm_finetune_kit.models.adapters import copy_adapter, restore_adapter, write_adapter
from llm_finetune_kit.models.loading import no_bars
from llm_finetune_kit.training.optimizer import restore_state, state_tensors
from llm_finetune_kit.training.scaling import LossScale

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
FORMAT = 2  # of trainer_state.json


@dataclass
class Progress:
    """Where a run stands, at an optimizer-step boundary."""

    step: int = 0
    tokens: int = 0
    evaluated: int = 0  # the step of the last evaluation
    sampled: int = 0  # the step of the last sample answers
    best_step: int | None = None
    best_loss: float | None = None
    stale_evaluations: int = 0
    moved: int = 0  # steps that changed the weights
    idle: int = 0  # steps whose gradient was zero
    usual_loss: float | None = None  # a running mean
    tokens_per_pass: int | None = None  # less than was planned, since memory ran out
    seconds: float = 0.0
    loss_scale: LossScale | None = None  # with float16


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, taken in an instant."""

    step: int
    best_step: int | None
    progress: dict[str, Any]
    optimizer: dict[str, torch.Tensor]
    write_weights: Callable[[Path], None]
    copied: bool  # so that training may go on while it is written; else the weights are the model's own

    def write(self, folder: Path) -> None:
        """Everything that a bit-exact resume needs, into an empty folder."""
        self.write_weights(folder)
        about_to("write", folder / OPTIMIZER)
        save_file(self.optimizer, folder / OPTIMIZER)
        write_json(folder / STATE, {"format": FORMAT, **self.progress})


def take(model: Any, optimizer: torch.optim.Optimizer, progress: Progress) -> Snapshot:
    """The state of a run now. An adapter is copied; the weights of a whole model are not, being too large for that."""
    state = state_tensors(optimizer, _trained(model)) | {f"random/{name}": part for name, part in random_state().items()}
    copied = hasattr(model, "peft_config")
    return Snapshot(progress.step, progress.best_step, asdict(progress), state, weights_writer(model), copied)


def weights_writer(model: Any, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    """What writes the trained weights in PEFT's layout, or the whole model in transformers' (in `dtype` if given)."""
    if hasattr(model, "peft_config"):
        adapter = copy_adapter(model)
        return lambda folder: write_adapter(adapter, folder)
    return lambda folder: _write_model(model, folder, dtype)


def _write_model(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    state = model.state_dict()
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    about_to("write", folder / "model.safetensors")
    with no_bars():
        model.save_pretrained(folder, state_dict=state, max_shard_size="100GB")
    if dtype is not None:  # transformers notes the dtype in memory, not that of the file
        path = folder / "config.json"
        write_json(path, read_json(path) | {"dtype": str(dtype).removeprefix("torch.")})


def restore(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> Progress:
    """Put a checkpoint back into the model and the optimizer, and the random state too.

    Raises ModelError for one of another format or of another model.
    """
    state = read_json(folder / STATE)
    written = state.pop("format", None)
    if written != FORMAT:
        by = read_json(folder / MANIFEST).get("versions", {}).get("llm-finetune-kit", "another version")
        problem = f"was written in format {written}, and this version reads format {FORMAT}"
        fix = f"go on with llm-finetune-kit {by}, or start a new run with the run's config.yaml"
        raise ModelError(25, problem, where=str(folder), fix=fix)
    restore_weights(model, folder)
    tensors = load_file(folder / OPTIMIZER)
    restore_state(optimizer, _trained(model), tensors)
    restore_random_state({name.partition("/")[2]: part for name, part in tensors.items() if name.startswith("random/")})
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
        reason = damage(folder)
        if reason is None:
            return folder, passed
        passed.append(f"{folder.name} {reason}")
    return None, passed


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def random_state() -> dict[str, torch.Tensor]:
    """The states of all random generators: torch's on the CPU and the GPU, Python's and NumPy's."""
    _, keys, *rest = np.random.get_state(legacy=True)
    tensors = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "numpy-rest": torch.tensor(rest, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_random_state(tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(tensors["cpu"])
    random.setstate((3, tuple(tensors["python"].tolist()), None))
    position, has_gauss, gauss = tensors["numpy-rest"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
