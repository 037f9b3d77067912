"""Models as the loop wants them: frozen weights in the fast dtype, trained weights in float32, attention per document."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llm_finetune_kit.errors import ConfigError, ModelError
from llm_finetune_kit.models.attention import NAME, register
from llm_finetune_kit.models.locate import Located
from llm_finetune_kit.models.quantization import loading_settings, quantization_facts, require_bitsandbytes
from llm_finetune_kit.models.safety import FLOATS, Stored, check_folder, read_header, weight_files

# Faults of this module:  7 cannot be loaded   39 NaN or Inf   40 config and weights disagree   CONFIG 30 packed, trained in full

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Number formats of safetensors: integers of their width, their bits but the sign, the least pattern of Inf and NaN.
PATTERNS = {
    "F64": (torch.int64, (1 << 63) - 1, 0x7FF0 << 48),
    "F32": (torch.int32, (1 << 31) - 1, 0x7F80_0000),
    "F16": (torch.int16, (1 << 15) - 1, 0x7C00),
    "BF16": (torch.int16, (1 << 15) - 1, 0x7F80),
}
NOT_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"  # what transformers reads to load without threads
BLOCK = 1 << 18  # bytes looked at at once for NaN: they stay in the cache


def load_base(
    located: Located,
    dtype: str,
    device: str = "cpu",
    *,
    quantization: str | None = None,
    double_quantization: bool = True,
) -> Any:
    """The model's weights in `dtype` on `device`; with `quantization` (nf4, fp4, int8) the blocks' linear layers packed.

    Embeddings, head and norms stay in `dtype`. Raises ModelError if the files are not sound and MachineError if
    bitsandbytes is missing.
    """
    if quantization is not None:
        require_bitsandbytes()
    check_folder(located.folder, trusted=located.trusted)
    for path in weight_files(located.folder):
        check_finite(path, read_header(path))
    register()
    how: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantization is not None:
        how["quantization_config"] = loading_settings(quantization, double_quantization, DTYPES[dtype])
        how["device_map"] = {"": device}  # each weight is packed as it is read, where it will stay
    model = _from_files(located, how)
    model.set_attn_implementation(NAME)  # the few model classes that know only their own attention keep it
    _plain_activations(model)
    if quantization is None:
        return model.to(device)
    from llm_finetune_kit.models.quantized_layers import freeze_quantized

    return freeze_quantized(model)


def _from_files(located: Located, how: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with no_bars(), _one_by_one() if "quantization_config" in how else nullcontext():
            model, outcome = AutoModelForCausalLM.from_pretrained(
                located.folder,
                trust_remote_code=located.trusted,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **how,
            )
    except Exception as error:  # transformers and safetensors raise OSError, ValueError, SafetensorError and others
        raise ModelError(
            7,
            "the weights cannot be loaded",
            where=str(located.folder),
            why=str(error).strip().splitlines()[0][:200],
            fix="download the model again; only safetensors files are read",
        ) from error
    _check_complete(model, outcome, located.folder)
    return model


def _check_complete(model: Any, outcome: dict[str, Any], folder: Path) -> None:
    """Raise ModelError if weights are missing, or if the file has more layers than the config: both compute nonsense."""
    missing = sorted(outcome["missing_keys"])
    kinds = {_without_numbers(name) for name, _ in model.named_parameters()}
    more = sorted(name for name in outcome["unexpected_keys"] if _without_numbers(name) in kinds)
    if missing or more:
        fault = f"{len(missing)} weights are missing" if missing else f"{len(more)} weights have no place in it"
        raise ModelError(
            40,
            f"config.json and the weights belong to different models: {fault}, such as {(missing or more)[0]}",
            where=str(folder),
            fix="take config.json and the weights from the same revision of the model",
        )


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name)


def check_finite(path: Path, stored: list[Stored]) -> None:
    """Raise ModelError naming the first tensor of a safetensors file that holds NaN or Inf.

    The file is read block by block, so memory stays as it is (a gigabyte in the system's cache took 0.7 to 1.1 s).
    """
    buffer = bytearray(BLOCK)
    with open(path, "rb") as file:
        for tensor in sorted((one for one in stored if one.dtype in FLOATS), key=lambda one: one.start):
            integers, magnitude, infinite = PATTERNS[tensor.dtype]
            file.seek(tensor.start)
            left = tensor.end - tensor.start
            while left > 0:
                got = file.readinto(memoryview(buffer)[: min(left, BLOCK)])
                bits = torch.frombuffer(buffer, dtype=torch.uint8, count=got).view(integers)
                if int(bits.bitwise_and(magnitude).max()) >= infinite:
                    raise ModelError(
                        39,
                        f"holds NaN or infinite values in {tensor.name}",
                        where=str(path),
                        why="all that is computed with it would be NaN",
                        fix="download the model again, or take a checkpoint from before it broke",
                    )
                left -= got


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Have transformers read a file tensor by tensor, each only when the one before is packed.

    Mapped into memory, or read ahead by its threads, nearly all of the file would be held before it is packed.
    """
    from transformers import modeling_utils

    mapped, ahead = modeling_utils.safe_open, os.environ.get(NOT_AHEAD)
    modeling_utils.safe_open = lambda file, **how: mapped(file, **(how | {"backend": "pread"}))
    os.environ[NOT_AHEAD] = "1"
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped
        if ahead is None:
            del os.environ[NOT_AHEAD]
        else:
            os.environ[NOT_AHEAD] = ahead


def _plain_activations(model: Any) -> None:
    """GPT-2's GELU is written out as seven passes over the activation; torch has the same function as one."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


@contextmanager
def no_bars() -> Iterator[None]:
    """The engine does not print, so its libraries must not either."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def train_all(model: Any) -> Any:
    """The model with all weights trainable in float32. Raises ConfigError if it is quantized."""
    if quantization_facts(model):
        fix = "set method: lora, or leave model.quantization out"
        raise ConfigError(30, "a quantized model cannot be trained in full", where="model.quantization", fix=fix)
    return model.float().requires_grad_(True)
