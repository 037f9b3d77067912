"""Full fine-tuning of the upper part of a model."""

from __future__ import annotations

from typing import Any

import torch


def blocks(model: Any) -> torch.nn.ModuleList:
    """The transformer blocks of a model, in their order, whatever its classes call them."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next(found for found in lists if len(found) == count)


def freeze(model: Any, layers: int) -> None:
    """Leave the embeddings and the first `layers` blocks as they are; 0 freezes nothing.

    A head that is tied to the embeddings is the same matrix, so it is frozen with them and stays tied. That the model
    has so many blocks is for plan/contradictions.py.
    """
    if layers == 0:
        return
    found = blocks(model)
    inner = model.base_model
    own = [child for child in inner.children() if isinstance(child, torch.nn.Embedding)]  # GPT-2 has one for positions too
    for part in (model.get_input_embeddings(), *own, *found[:layers]):
        part.requires_grad_(False)
