"""The models that the speed benchmark trains, and how long the documents of each are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_finetune_kit.models.facts import ModelFacts

RANK = 16


@dataclass(frozen=True)
class Lengths:
    """Documents of `least` to `most` tokens, so many a step. Alpaca's longer ones are cut at `most`."""

    least: int
    most: int
    documents_per_step: int


@dataclass(frozen=True)
class Shape:
    """A published shape with random weights, or (`config` is empty) the demo model with its real ones."""

    title: str
    config: str  # file in configs/
    tokenizer: str  # folder in tokenizers/
    stored: str  # number format of the weights on disk, from which every contender starts
    long: Lengths

    @property
    def lengths(self) -> dict[str, Lengths]:
        """The sets of documents; `prompted` is Alpaca behind the words that its own trainer puts before each row."""
        return {"alpaca": Lengths(1, 512, 4), "prompted": Lengths(1, 512, 4), "long": self.long}


# Long documents end where the model's positions do. A step of TinyLlama has one, so that the contender that computes in
# float32 and keeps every activation fits into 24 GiB.
SHAPES = {
    "gpt2": Shape("a GPT-2-124M-shaped model", "gpt2.config.json", "gpt2", "float32", Lengths(600, 1024, 4)),
    "tinyllama": Shape(
        "a TinyLlama-1.1B-shaped model",
        "tinyllama-1.1b-chat-v1.0.config.json",
        "llama2",
        "bfloat16",
        Lengths(1000, 2048, 1),
    ),
    "demo": Shape("the demo model (4.5M)", "", "", "bfloat16", Lengths(300, 512, 4)),
}


def lora_settings(facts: ModelFacts) -> dict[str, Any]:
    """LoRA on all linear layers of the blocks, in PEFT's words."""
    return {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "target_modules": facts.linear_names,
        "fan_in_fan_out": facts.architecture == "GPT2LMHeadModel",
        "task_type": "CAUSAL_LM",
    }


def counts(facts: ModelFacts) -> dict[str, Any]:
    """What the arithmetic of a training step follows from; `first_mlp` is (inputs, outputs) of the first MLP product."""
    return {
        "block_weights": facts.linear_parameters,
        "head_weights": facts.head_parameters,
        "adapter_weights": facts.lora_parameters(RANK, facts.linear_names),
        "attention_width": facts.layers * facts.heads * facts.head_dim,
        "first_mlp": [facts.hidden, facts.intermediate],
    }


def flops_per_token(frozen: dict[str, Any]) -> float:
    """Of one real token in a LoRA step without recompute: 4N + 4·p·Nh + 6A + 6·L·q·S.

    N weights in the blocks, Nh in the output head, A in the adapter; p the share of supervised tokens, L·q layers times
    width of the queries, S the mean length of the document that a token stands in.
    """
    linear = 4 * frozen["block_weights"] + 6 * frozen["adapter_weights"]
    head = 4 * frozen["supervised_share"] * frozen["head_weights"]
    return float(linear + head + 6 * frozen["attention_width"] * frozen["length_of_a_token"])
