"""The memory model against what torch really keeps, and its own invariants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_finetune_kit.models import together
from llm_finetune_kit.models.adapters import add_lora
from llm_finetune_kit.models.attention import NAME, register
from llm_finetune_kit.models.facts import facts_of_model
from llm_finetune_kit.models.loading import _plain_activations, train_all
from llm_finetune_kit.plan.memory import Work, activations, block_bytes, bytes_per_weight, moments, peak, weight_bytes
from llm_finetune_kit.training.step import Objective

TOKENS, R = 64, 8
WIDE = {
    "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "pad_token_id": 0,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": WIDE | {"head_dim": 16},
    "gemma2": WIDE | {"head_dim": 16},
    "olmo2": WIDE,
    "gpt2": {"n_embd": 64, "n_head": 4, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0},
}


def built(kind: str, layers: int, dtype: torch.dtype = torch.float32) -> Any:
    register()
    torch.manual_seed(0)
    key = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPES[kind], **{key: layers}), dtype=dtype)
    model.set_attn_implementation(NAME)
    _plain_activations(model)
    return model


def kept_bytes(kind: str, method: str, dtype: torch.dtype, layers: int) -> int:
    """Bytes that autograd saves in a forward pass, each storage once, weights not counted."""
    model = built(kind, layers, dtype if method == "lora" else torch.float32)
    if method == "lora":
        names = facts_of_model(model, kind).linear_names
        model = add_lora(model, r=R, alpha=R, dropout=0.0, targets=names, base_name="x", seed=0)
    else:
        model = train_all(model)
    objective = Objective(model, dtype)
    model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            seen.setdefault(place, tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), objective.precision():
        hidden = objective._hidden(torch.arange(TOKENS) % 100, (TOKENS,))
    assert hidden.shape[0] == TOKENS
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_block_keeps_what_the_formula_says(kind: str, method: str, dtype: str) -> None:
    """Of two models that differ by a block, so that what stands outside the blocks cancels."""
    found = kept_bytes(kind, method, getattr(torch, dtype), 3) - kept_bytes(kind, method, getattr(torch, dtype), 2)
    model = facts_of_model(built(kind, 3), kind)
    work = Work(method, dtype, TOKENS, TOKENS, r=R if method == "lora" else 0, targets=tuple(model.linear_names))
    work = work if method == "lora" else replace(work, targets=())
    copies = 0
    if dtype == "bfloat16":  # of weights in the dtype of products: they belong to another part
        copies = 2 * (model.linear_parameters if work.full else model.lora_parameters(R, model.linear_names)) // model.layers
    assert block_bytes(model, work) == pytest.approx(found - copies, rel=0.04)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_an_mlp_computed_layer_by_layer_keeps_its_products(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where adapters drop or blocks are compiled; what dropout keeps besides is not counted."""
    monkeypatch.setattr(together, "_learning", lambda: False)
    found = kept_bytes(kind, "lora", torch.float32, 3) - kept_bytes(kind, "lora", torch.float32, 2)
    model = facts_of_model(built(kind, 3), kind)
    work = Work("lora", "float32", TOKENS, TOKENS, r=R, targets=tuple(model.linear_names))
    assert block_bytes(model, work) < 0.85 * found
    for one_by_one in (replace(work, dropout=True), replace(work, compiled=True)):
        assert block_bytes(model, one_by_one) == pytest.approx(found, rel=0.04)


def llama() -> Any:
    return facts_of_model(built("llama", 12), "llama")


def lora(model: Any, **values: Any) -> Work:
    targets = model.linear_names
    trained = model.lora_parameters(R, targets)
    return replace(Work("lora", "bfloat16", 2048, 512, r=R, targets=tuple(targets), trained=trained), **values)


def total(model: Any, work: Work) -> int:
    return sum(peak(model, work)[1].values())


def test_the_peak_is_the_worst_moment() -> None:
    model = llama()
    found = moments(model, lora(model))
    name, parts = peak(model, lora(model))
    assert sum(parts.values()) == max(sum(moment.values()) for moment in found.values())
    assert name == "forward" and parts["activations"] > 0


def test_more_recomputation_keeps_less() -> None:
    model = llama()
    kept = [sum(activations(model, lora(model, recompute=every)).values()) for every in (0, 4, 2, 1)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


def test_activations_grow_with_tokens_and_pairs_only_where_they_are_kept() -> None:
    model, gpt2 = llama(), facts_of_model(built("gpt2", 4), "gpt2")
    assert block_bytes(model, lora(model, tokens=4096)) == 2 * block_bytes(model, lora(model))
    assert block_bytes(model, lora(model, longest=2048)) == block_bytes(model, lora(model))
    assert block_bytes(gpt2, lora(gpt2, longest=2048)) > 2 * block_bytes(gpt2, lora(gpt2))  # dropout keeps every pair
    assert block_bytes(gpt2, lora(gpt2, longest=2048, device="cuda")) == block_bytes(gpt2, lora(gpt2, device="cuda"))


@pytest.mark.parametrize(
    ("kind", "double", "bits"), [("nf4", False, 4.5), ("nf4", True, 4.127), ("fp4", False, 4.5), ("int8", True, 8)]
)
def test_bits_of_a_packed_weight(kind: str, double: bool, bits: float) -> None:
    assert 8 * bytes_per_weight(kind, double, 2) == pytest.approx(bits, abs=0.001)


def test_weights_by_method() -> None:
    model = llama()
    rest = model.parameters - model.linear_parameters
    assert weight_bytes(model, Work("full", "bfloat16", 1, 1)) == 4 * model.parameters
    assert weight_bytes(model, lora(model)) == 2 * model.parameters
    assert weight_bytes(model, lora(model, quantization="int8")) == 2 * rest + model.linear_parameters


def test_what_saves_memory_does() -> None:
    model = llama()
    full = Work("full", "bfloat16", 2048, 512, trained=model.parameters)
    assert total(model, replace(full, optimizer="adamw_8bit", device="cuda")) < total(model, replace(full, device="cuda"))
    assert total(model, lora(model, tokens=512)) < total(model, lora(model))
    assert total(model, lora(model)) < total(model, full)
