"""The sizes of a model by arithmetic on its config.json: no torch, no weights, no files.

Only for families whose blocks are known here, each checked against the real model on torch's meta device;
`facts.model_facts` builds all others there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Layer = tuple[str, int, int]  # last name, inputs, outputs


@dataclass(frozen=True)
class ModelFacts:
    """Sizes that decide memory, time and what can be trained. Counts are of weights, tied ones once."""

    name: str
    architecture: str
    parameters: int
    linear_parameters: int  # in the linear layers of the blocks, which LoRA wraps; biases not counted
    linear_shapes: tuple[Layer, ...]  # of every such layer, in the order of the model
    layers: int
    hidden: int
    intermediate: int  # width inside the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int  # longest sequence it was made for
    stored_dtype: str
    gated: bool  # the MLP multiplies with a gate (SwiGLU, GeGLU)
    norms: int  # normalisations over the hidden width in one block
    query_key_norm: bool  # queries and keys are normalised too
    tied: bool  # the output head shares the embedding's weights
    embedding_parameters: int  # of tokens, and of positions where they are learned
    head_parameters: int  # of the output head, also where it is tied
    block_parameters: int  # all weights of one block
    bias_parameters: int  # all biases of the model
    experts: int  # 0, or experts in a block; transformers fuses theirs, so they are not among linear_shapes

    @property
    def linear_names(self) -> list[str]:
        """The distinct layer names that `all-linear` means, in the order of the model."""
        return list(dict.fromkeys(name for name, _, _ in self.linear_shapes))

    @property
    def block_shapes(self) -> tuple[Layer, ...]:
        """The linear layers of one block."""
        return self.linear_shapes[: len(self.linear_shapes) // max(1, self.layers)]

    @property
    def learned_positions(self) -> bool:
        """Whether positions are embeddings, so that a model cannot go beyond those it has."""
        return self.embedding_parameters >= (self.vocabulary + self.positions) * self.hidden

    def lora_parameters(self, r: int, targets: list[str]) -> int:
        """Weights of an adapter of rank r: r x (inputs + outputs) for every wrapped layer (Hu et al. 2021)."""
        return sum(r * (inputs + outputs) for name, inputs, outputs in self.linear_shapes if name in targets)


@dataclass(frozen=True)
class Family:
    """How the blocks of Llama's relatives differ, and what their config.json means where it is silent."""

    architecture: str
    vocabulary: int
    positions: int
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden width / heads
    tied: bool = False
    biases: Literal["none", "asked", "qkv"] = "asked"  # asked: where attention_bias or mlp_bias say so
    norms: int = 2
    query_key_norm: Literal["", "head", "full"] = ""  # over one head, or over all heads at once
    fused: bool = False  # queries, keys and values in one layer, gate and up in another


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", 32000, 2048),
    "mistral": Family("MistralForCausalLM", 32000, 131072, kv_heads=8, biases="none"),
    "qwen2": Family("Qwen2ForCausalLM", 151936, 32768, kv_heads=32, biases="qkv"),
    "qwen3": Family("Qwen3ForCausalLM", 151936, 32768, kv_heads=32, head_dim=128, query_key_norm="head"),
    "gemma": Family("GemmaForCausalLM", 256000, 8192, kv_heads=16, head_dim=256, tied=True),
    "gemma2": Family("Gemma2ForCausalLM", 256000, 8192, kv_heads=4, head_dim=256, tied=True, norms=4),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", 262208, 131072, kv_heads=4, head_dim=256, tied=True, norms=4, query_key_norm="head"
    ),
    "phi3": Family("Phi3ForCausalLM", 32064, 4096, biases="none", fused=True),
    "olmo2": Family("Olmo2ForCausalLM", 50304, 2048, query_key_norm="full"),
}


class _Unknown(ValueError):
    """A value that is missing, or that only transformers can judge."""


def facts_of(config: dict[str, Any], name: str) -> ModelFacts | None:
    """Facts about the model that a config.json describes; None where its family or its values are not known here."""
    kind = config.get("model_type")
    try:
        if kind == "gpt2":
            return _gpt2(config, name)
        family = FAMILIES.get(str(kind))
        return None if family is None else _llama_like(config, name, family)
    except _Unknown:
        return None


def _count(config: dict[str, Any], key: str, silent: int | None = None) -> int:
    """A whole number above zero; `silent` is what null or nothing at all means."""
    value = config.get(key)
    value = silent if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _Unknown(key)
    return value


def _llama_like(config: dict[str, Any], name: str, family: Family) -> ModelFacts:
    hidden, layers = _count(config, "hidden_size"), _count(config, "num_hidden_layers")
    heads, inner = _count(config, "num_attention_heads"), _count(config, "intermediate_size")
    vocabulary = _count(config, "vocab_size", family.vocabulary)
    silent = None if "num_key_value_heads" in config else family.kv_heads  # null and nothing mean different things
    kv_heads = _count(config, "num_key_value_heads", silent or heads)
    head_dim = _count(config, "head_dim", family.head_dim or hidden // heads)
    if heads % kv_heads:
        raise _Unknown("num_key_value_heads")
    tied = bool(config.get("tie_word_embeddings", family.tied))
    queries, keys = heads * head_dim, kv_heads * head_dim
    block = _block(family, hidden, inner, queries, keys)
    biases = _biases(config, family, block)
    head_norms = {"": 0, "head": 2 * head_dim, "full": queries + keys}[family.query_key_norm]
    in_block = sum(inputs * outputs for _, inputs, outputs in block)
    block_parameters = in_block + biases + family.norms * hidden + head_norms
    embedding = vocabulary * hidden
    return ModelFacts(
        name=name,
        architecture=family.architecture,
        parameters=layers * block_parameters + hidden + embedding * (1 if tied else 2),
        linear_parameters=layers * in_block,
        linear_shapes=block * layers,
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        positions=_count(config, "max_position_embeddings", family.positions),
        stored_dtype=stored_dtype(config),
        gated=True,
        norms=family.norms,
        query_key_norm=bool(family.query_key_norm),
        tied=tied,
        embedding_parameters=embedding,
        head_parameters=embedding,
        block_parameters=block_parameters,
        bias_parameters=layers * biases,
        experts=0,
    )


def _block(family: Family, hidden: int, inner: int, queries: int, keys: int) -> tuple[Layer, ...]:
    """The linear layers of one block, in the order in which the model holds them."""
    down = ("down_proj", inner, hidden)
    if family.fused:
        attention = (("o_proj", queries, hidden), ("qkv_proj", hidden, queries + 2 * keys))
        return (*attention, ("gate_up_proj", hidden, 2 * inner), down)
    read = (("q_proj", hidden, queries), ("k_proj", hidden, keys), ("v_proj", hidden, keys))
    return (*read, ("o_proj", queries, hidden), ("gate_proj", hidden, inner), ("up_proj", hidden, inner), down)


def _biases(config: dict[str, Any], family: Family, block: tuple[Layer, ...]) -> int:
    """Biases of one block."""
    if family.biases == "none":
        return 0
    biased = {"q_proj", "k_proj", "v_proj"} if family.biases == "qkv" else set()
    if family.biases == "asked" and config.get("attention_bias"):
        biased = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if family.architecture == "LlamaForCausalLM" and config.get("mlp_bias"):
        biased |= {"gate_proj", "up_proj", "down_proj"}
    return sum(outputs for name, _, outputs in block if name in biased)


def _gpt2(config: dict[str, Any], name: str) -> ModelFacts:
    """GPT-2: learned positions, biases everywhere, two LayerNorms, no gate."""
    hidden, layers, heads = (_count(config, f"n_{key}") for key in ("embd", "layer", "head"))
    vocabulary, positions = _count(config, "vocab_size", 50257), _count(config, "n_positions", 1024)
    inner = _count(config, "n_inner", 4 * hidden)
    if hidden % heads or config.get("add_cross_attention"):
        raise _Unknown("n_head")
    tied = bool(config.get("tie_word_embeddings", True))
    attention = (("c_attn", hidden, 3 * hidden), ("c_proj", hidden, hidden))
    block = (*attention, ("c_fc", hidden, inner), ("c_proj", inner, hidden))
    in_block = sum(inputs * outputs for _, inputs, outputs in block)
    biases = sum(outputs for _, _, outputs in block) + 2 * hidden
    head = vocabulary * hidden
    embedding = head + positions * hidden
    block_parameters = in_block + biases + 2 * hidden
    return ModelFacts(
        name=name,
        architecture="GPT2LMHeadModel",
        parameters=layers * block_parameters + 2 * hidden + embedding + (0 if tied else head),
        linear_parameters=layers * in_block,
        linear_shapes=block * layers,
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        positions=positions,
        stored_dtype=stored_dtype(config),
        gated=False,
        norms=2,
        query_key_norm=False,
        tied=tied,
        embedding_parameters=embedding,
        head_parameters=head,
        block_parameters=block_parameters,
        bias_parameters=layers * biases + hidden,
        experts=0,
    )


def stored_dtype(config: dict[str, Any]) -> str:
    """The number format of the stored weights, under its new and its old name in config.json."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(dtype).removeprefix("torch.")
