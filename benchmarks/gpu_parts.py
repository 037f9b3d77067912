"""What the checks and the measurements of gpu.py share: models with random weights of real shapes, documents, our own loop."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.events import Event
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.models.attention import NAME, register
from llm_finetune_kit.models.loading import _plain_activations
from llm_finetune_kit.training.checkpoint import Progress
from llm_finetune_kit.training.compiled import compile_blocks
from llm_finetune_kit.training.fused import fuse
from llm_finetune_kit.training.loop import Schedule, fit
from llm_finetune_kit.training.optimizer import make_optimizer
from llm_finetune_kit.training.scaling import LossScale
from llm_finetune_kit.training.step import Objective

SEED = 20260101
RANK = 16
RATE = 2e-4
Document = tuple[list[int], list[bool]]  # token ids, and which of them are learned
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 256, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "llama": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rope_scaling": None,
    },
}  # fmt: skip
TINY |= dict.fromkeys(("qwen3", "gemma"), TINY["llama"])
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Place:
    """Where things run: `dry` is a rehearsal on the CPU with tiny shapes."""

    device: torch.device
    data: Path | None
    dry: bool


def read_config(place: Place, file: str) -> Any:
    """A published config without dropout; in a rehearsal of its family in tiny."""
    family = "gpt2" if file.startswith("gpt2") else "llama"
    if place.dry or place.data is None:
        return tiny_config(family)
    stored = json.loads((place.data / "configs" / file).read_text())
    stored = {key: value for key, value in stored.items() if key not in ("torch_dtype", "dtype", "architectures")}
    return AutoConfig.for_model(**(stored | (NO_DROPOUT if family == "gpt2" else {})))


def tiny_config(family: str) -> Any:
    return AutoConfig.for_model(family, **(TINY[family] | ENDS | (NO_DROPOUT if family == "gpt2" else {})))


def build(config: Any, device: torch.device, dtype: torch.dtype, *, packed: bool = False, attention: str = "sdpa") -> Any:
    """A model with random weights, the same ones for the same config, made where it stays; `packed` blocks are in NF4."""
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False)
    return pack(model, dtype, device) if packed else model


def pack(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with the linear layers of its blocks in 4 bits, as transformers would load it."""
    import bitsandbytes.nn as bnb

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child is not head:
                how: dict[str, Any] = {"bias": child.bias is not None, "compute_dtype": dtype, "quant_type": "nf4"}
                layer = bnb.Linear4bit(child.in_features, child.out_features, device="meta", **how)
                layer.weight = bnb.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to(device)
                layer.bias = child.bias
                setattr(module, name, layer)
    model.is_loaded_in_4bit = True
    return model


def ours(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    compiled: bool = False,
    fused: bool = False,
) -> Objective:
    """The engine's objective over such a model with LoRA on all linear layers of its blocks."""
    register()
    model = build(config, device, dtype, packed=packed)
    model.set_attn_implementation(NAME)
    _plain_activations(model)
    if packed:
        from llm_finetune_kit.models.quantized_layers import freeze_quantized

        model = freeze_quantized(model)
    model = add_lora(model, r=RANK, alpha=2 * RANK, dropout=0.0, targets=targets(config), base_name="random", seed=SEED)
    objective = Objective(model, dtype)
    if compiled:
        objective.not_compiled = compile_blocks(objective)
    if fused:
        objective.not_fused = fuse(objective)
    return objective


def targets(config: Any) -> list[str]:
    gpt2, llama = ["c_attn", "c_proj", "c_fc"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return gpt2 if config.model_type == "gpt2" else llama


def documents(place: Place, count: int, vocabulary: int) -> list[Document]:
    """Alpaca's documents in a fixed random order, their ids folded into the vocabulary; in a rehearsal random ones."""
    if place.dry or place.data is None:
        dice = random.Random(SEED)
        lengths = [dice.randint(4, 40) for _ in range(count)]
        return [([dice.randrange(3, vocabulary) for _ in range(length)], [at > 1 for at in range(length)]) for length in lengths]
    from transformers import GPT2Tokenizer

    from freeze import IGNORED, sample_documents

    words = place.data / "tokenizers" / "gpt2"
    tokenizer = GPT2Tokenizer(vocab=str(words / "vocab.json"), merges=str(words / "merges.txt"))
    found = sample_documents(place.data, tokenizer, count)
    return [([token % vocabulary for token in ids], [label != IGNORED for label in labels]) for ids, labels in found]


def tokens_of(found: list[Document]) -> Tokens:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in found])]).astype(np.int64)
    ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in found])
    trained = np.concatenate([np.asarray(trained) for _, trained in found])
    return Tokens(ids, trained, starts, np.arange(len(found), dtype=np.int32))


def train(objective: Objective, tokens: Tokens, per_step: int, steps: int, budget: int, listen: Callable[[Event], None]) -> None:
    """The engine's own loop over the first `steps` steps of the documents."""
    scaled = objective.dtype is torch.float16
    schedule = Schedule(
        rates=[RATE] * steps, examples_per_step=per_step, tokens_per_pass=budget, packing=True, max_grad_norm=1.0,
        eval_steps=steps, save_steps=steps, patience=None, seed=SEED, scaled=scaled,
    )  # fmt: skip
    progress = Progress(loss_scale=LossScale() if scaled else None)
    optimizer = make_optimizer(objective.model.named_parameters(), 0.0)
    fit(objective, optimizer, tokens, None, schedule, progress, lambda _: None, listen)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
