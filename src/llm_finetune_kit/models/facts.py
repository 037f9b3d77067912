"""Facts about a model, read from its config.json: no weights are loaded, and for known families no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_finetune_kit.catalog import SHAPES, short_name
from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.models.shapes import FAMILIES, Layer, ModelFacts, facts_of

__all__ = ["ModelFacts", "facts_by_name", "linear_layers", "model_facts", "read_config"]


def facts_by_name(name: str) -> ModelFacts | None:
    """Facts about a model of the catalog, by short name or hub id, without any of its files; None for all others."""
    short = short_name(name)
    return None if short is None else facts_of(SHAPES[short], name)


def model_facts(folder: Path, name: str, *, trusted: bool = False) -> ModelFacts:
    """Facts about the model in a folder. Raises ModelError if its config.json cannot be used."""
    return facts_of(_plain_config(folder), name) or _built_facts(folder, name, trusted)


def _plain_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; nothing where it cannot be read, which transformers then explains."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def read_config(folder: Path, *, trusted: bool = False) -> Any:
    """The transformers config in a folder. Raises ModelError if it cannot be read or needs code of its own."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others here
        raise ModelError(
            5,
            "config.json cannot be used",
            where=str(folder),
            why=_said(error),
            fix="use a model that transformers knows without code of its own",
        ) from error


def _said(error: Exception) -> str:
    """The first two lines of an error, as the second one often names the value."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:200]


def _built_facts(folder: Path, name: str, trusted: bool = False) -> ModelFacts:
    """Facts about any causal model, by building it without memory."""
    model = built_empty(folder, trusted)
    try:
        return facts_of_model(model, name)
    except Exception as error:  # a model of another kind, such as one without attention heads
        raise _unfit(model.config, folder, error) from error


def built_empty(folder: Path, trusted: bool = False) -> Any:
    """The model that a folder's config.json describes, without weights and without memory (torch's meta device).

    Raises ModelError where it is no causal language model, or one of another kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(folder, trusted=trusted)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except Exception as error:  # no causal model
        raise _unfit(config, folder, error) from error


def _unfit(config: Any, folder: Path, error: Exception) -> ModelError:
    return ModelError(
        6,
        f"{config.model_type} models cannot be fine-tuned here",
        where=str(folder),
        why=_said(error),
        fix=f"use a causal language model: {', '.join(['gpt2', *FAMILIES])} and their like",
    )


def facts_of_model(model: Any, name: str) -> ModelFacts:
    """Facts about a model that is built, on whatever device."""
    import torch

    config = model.config
    text = config.get_text_config()
    shapes = tuple(linear_layers(model))
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    blocks = next((part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == layers), None)
    norms = [] if blocks is None else [path for path, part in blocks[0].named_modules() if "norm" in type(part).__name__.lower()]
    on_heads = [path for path in norms if path.rpartition(".")[2] in ("q_norm", "k_norm")]
    head, weights = model.get_output_embeddings(), dict(model.named_parameters())
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or getattr(text, "ffn_dim", None)
    return ModelFacts(
        name=name,
        architecture=type(model).__name__,
        parameters=sum(weight.numel() for weight in weights.values()),
        linear_parameters=sum(inputs * outputs for _, inputs, outputs in shapes),
        linear_shapes=shapes,
        layers=layers,
        hidden=text.hidden_size,
        intermediate=inner or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", 2048),
        stored_dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        gated=any("gate_proj" in path or "gate_up" in path for path in weights),
        norms=len(norms) - len(on_heads),
        query_key_norm=bool(on_heads),
        tied=head.weight is model.get_input_embeddings().weight,
        embedding_parameters=sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Embedding)),
        head_parameters=head.weight.numel(),
        block_parameters=0 if blocks is None else sum(weight.numel() for weight in blocks.parameters()) // layers,
        bias_parameters=sum(weight.numel() for path, weight in weights.items() if path.endswith("bias")),
        experts=getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0,
    )


def linear_layers(model: Any) -> list[Layer]:
    """Name, inputs and outputs of every linear layer but the output head, GPT-2's Conv1D included."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = []
    for path, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            found.append((path.rpartition(".")[2], module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            found.append((path.rpartition(".")[2], module.nx, module.nf))
    return found
