"""Models as the loop wants them: frozen weights in the fast dtype, trained weights in float32, attention per document."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.models.attention import NAME, register
from llm_finetune_kit.models.locate import Located

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(located: Located, dtype: str, device: str = "cpu") -> Any:
    """The model's weights in `dtype` on `device`. Raises ModelError if the files are not sound."""
    from transformers import AutoModelForCausalLM

    register()
    try:
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(
                located.folder,
                dtype=DTYPES[dtype],
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
            )
    except Exception as error:  # transformers and safetensors raise OSError, ValueError, SafetensorError and others
        raise ModelError(
            7,
            "the weights cannot be loaded",
            where=str(located.folder),
            why=str(error).strip().splitlines()[0][:200],
            fix="download the model again; only safetensors files are read",
        ) from error
    model.set_attn_implementation(NAME)  # the few model classes that know only their own attention keep it
    _plain_activations(model)
    return model.to(device)


def _plain_activations(model: Any) -> None:
    """GPT-2's GELU is written out as seven passes over the activation; torch has the same function as one."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


@contextmanager
def _no_bars() -> Iterator[None]:
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
    """The model with all weights trainable in float32."""
    return model.float().requires_grad_(True)
