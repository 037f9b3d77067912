"""LoRA on a base model: put on, loaded, and asked which base it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llm_finetune_kit.errors import ModelError


def add_lora(model: Any, *, r: int, alpha: int, dropout: float, targets: list[str], base_name: str, seed: int) -> Any:
    """The model with trainable low-rank matrices (float32) beside frozen layers. Raises ModelError for unknown targets."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from llm_finetune_kit.models.lora import FAST_LAYERS

    wrapped = [module for path, module in model.named_modules() if path.rpartition(".")[2] in targets]
    settings = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in wrapped),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
    )
    settings._register_custom_module(FAST_LAYERS)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
    settings.base_model_name_or_path = base_name
    return _without_input_copies(adapted)


def _without_input_copies(model: Any) -> Any:
    """Keep PEFT from copying every layer's input to float32: autocast brings each product to the right dtype."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return model


def load_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """The base model with the adapter in `folder` on it."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable, local_files_only=True)
    except Exception as error:
        raise ModelError(
            21,
            "the adapter does not fit this model",
            where=str(folder),
            why=str(error).strip().splitlines()[0][:200],
            fix="use the base model that adapter_config.json names",
        ) from error
    return _without_input_copies(adapted)


def base_of_adapter(folder: Path) -> str | None:
    """The base model's name if `folder` holds an adapter, else None."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError) as error:
        raise ModelError(22, "names no base model", where=str(path), fix="train again, or restore the file") from error
