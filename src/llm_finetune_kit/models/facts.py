"""Facts about a model, read from its config.json: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import ModelError


@dataclass(frozen=True)
class ModelFacts:
    """Sizes that decide memory, time and what can be trained. Counts are of weights, tied ones once."""

    name: str
    architecture: str
    parameters: int
    linear_parameters: int  # in the linear layers of the blocks, which LoRA wraps
    linear_shapes: tuple[tuple[str, int, int], ...]  # last name, inputs, outputs, of every such layer
    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocabulary: int
    positions: int  # longest sequence it was made for
    stored_dtype: str

    @property
    def linear_names(self) -> list[str]:
        """The distinct layer names that `all-linear` means, in the order of the model."""
        return list(dict.fromkeys(name for name, _, _ in self.linear_shapes))

    def lora_parameters(self, r: int, targets: list[str]) -> int:
        """Weights of an adapter of rank r: r x (inputs + outputs) for every wrapped layer (Hu et al. 2021)."""
        return sum(r * (inputs + outputs) for name, inputs, outputs in self.linear_shapes if name in targets)


def read_config(folder: Path) -> Any:
    """The transformers config in a folder. Raises ModelError if it cannot be read or needs code of its own."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others here
        raise ModelError(
            5,
            "config.json cannot be used",
            where=str(folder),
            why=str(error).strip().splitlines()[0][:200],
            fix="use a model that transformers knows without code of its own",
        ) from error


def model_facts(folder: Path, name: str) -> ModelFacts:
    """Facts about the model in a folder, by building it without memory (torch's meta device)."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ModelError(
            6,
            f"{config.model_type} models cannot be fine-tuned here",
            where=str(folder),
            why=str(error).splitlines()[0][:200],
            fix="use a causal language model: GPT-2, Llama, Mistral, Phi, Qwen, Gemma and their like",
        ) from error
    shapes = tuple(linear_layers(model))
    text = config.get_text_config()
    heads = text.num_attention_heads
    return ModelFacts(
        name=name,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_parameters=sum(inputs * outputs for _, inputs, outputs in shapes),
        linear_shapes=shapes,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=max((outputs for _, _, outputs in shapes), default=4 * text.hidden_size),
        heads=heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", 2048),
        stored_dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
    )


def linear_layers(model: Any) -> list[tuple[str, int, int]]:
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
