"""An adapter under LitGPT's names, where queries, keys and values share one product, and under PEFT's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OTHERS = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}

Weights = Mapping[str, torch.Tensor]


def from_peft(adapter: Weights, layers: int) -> dict[str, torch.Tensor]:
    """The weights of q, k and v one below the other, A [3 r, inputs] and B [all outputs, r]; the rest renamed."""
    found = {}
    for layer in range(layers):
        for half in ("lora_A", "lora_B"):
            found[fused(layer, half)] = torch.cat([adapter[peft(layer, name, half)] for name in QKV])
            for name, other in OTHERS.items():
                found[litgpt(layer, name, half)] = adapter[peft(layer, other, half)]
    return found


def to_peft(weights: Weights, layers: int, outputs: list[int]) -> dict[str, torch.Tensor]:
    """The way back; `outputs` are those of q, k and v. Weights that are not of the adapter are left out."""
    found = {}
    for layer in range(layers):
        for half in ("lora_A", "lora_B"):
            joined = weights[fused(layer, half)]
            parts = joined.chunk(len(QKV)) if half == "lora_A" else joined.split(outputs)
            found.update({peft(layer, name, half): part for name, part in zip(QKV, parts, strict=True)})
            found.update({peft(layer, other, half): weights[litgpt(layer, name, half)] for name, other in OTHERS.items()})
    return found


def fused(layer: int, half: str) -> str:
    return litgpt(layer, "attn.qkv", half)


def litgpt(layer: int, name: str, half: str) -> str:
    return f"transformer.h.{layer}.{name}.{half}"


def peft(layer: int, name: str, half: str) -> str:
    return f"base_model.model.model.layers.{layer}.{name}.{half}.weight"
