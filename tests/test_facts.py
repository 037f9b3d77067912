"""Facts by arithmetic equal the facts of the real model, which is the oracle here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.models.facts import _built_facts, model_facts
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.shapes import FAMILIES, facts_of

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 99,
    "pad_token_id": 0,
}
TINY_GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 99}


def written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_arithmetic_equals_the_real_model_for_every_collected_config(shared: Path, tmp_path: Path) -> None:
    files = sorted((shared / "configs").glob("*.json"))
    assert len(files) >= 24
    by_arithmetic = 0
    for path in files:
        config = json.loads(path.read_text())
        folder = written(tmp_path / path.stem, config)
        real = _built_facts(folder, path.stem)
        assert model_facts(folder, path.stem) == real
        by_arithmetic += facts_of(config, path.stem) == real
    assert by_arithmetic >= 23  # all but Mixtral


def test_arithmetic_equals_the_real_model_for_the_small_models_at_hand(shared: Path) -> None:
    for folder in (demo_folder(), shared / "models" / "stories260K-hf", shared / "models" / "TinyStories-656K"):
        found = facts_of(json.loads((folder / "config.json").read_text()), "x")
        assert found is not None
        assert found == _built_facts(folder, "x")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "asked",
    [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 3, "head_dim": 20},
        {"num_key_value_heads": 6, "tie_word_embeddings": True, "dtype": "float16"},
        {"num_key_value_heads": 6, "tie_word_embeddings": False, "max_position_embeddings": 77},
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "torch_dtype": "bfloat16"},
    ],
)
def test_every_family_in_every_dress(kind: str, asked: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": kind, **TINY, **asked}
    real = _built_facts(written(tmp_path, config), "x")
    assert facts_of(config, "x") == real


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "olmo2"])  # the others refuse null there
def test_null_means_as_many_heads_as_queries(kind: str, tmp_path: Path) -> None:
    config = {"model_type": kind, **TINY, "num_key_value_heads": None}
    facts = facts_of(config, "x")
    assert facts == _built_facts(written(tmp_path, config), "x")
    assert facts is not None and facts.kv_heads == 6


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_config_json_leaves_out_means_what_transformers_means(kind: str, tmp_path: Path) -> None:
    config = {"model_type": kind, "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 32}
    real = _built_facts(written(tmp_path, config), "x")
    assert facts_of(config, "x") == real


@pytest.mark.parametrize("asked", [{}, {"n_inner": 70}, {"tie_word_embeddings": False, "n_positions": 55}, {"dtype": "bfloat16"}])
def test_gpt2_in_every_dress(asked: dict[str, Any], tmp_path: Path) -> None:
    config = TINY_GPT2 | asked
    assert facts_of(config, "x") == _built_facts(written(tmp_path, config), "x")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt_neox", **TINY},
        {"model_type": "llama", **TINY, "num_attention_heads": 4, "num_key_value_heads": 3},  # transformers' own matter
        {"model_type": "llama", **TINY, "hidden_size": "48"},
        {"model_type": "llama", **TINY, "num_hidden_layers": True},
        {"model_type": "llama", **TINY, "intermediate_size": 0},
        TINY_GPT2 | {"n_embd": 50},
        TINY_GPT2 | {"add_cross_attention": True},
        {},
    ],
)
def test_what_is_not_understood_is_not_guessed(config: dict[str, Any]) -> None:
    assert facts_of(config, "x") is None


def test_other_families_are_built(tmp_path: Path) -> None:
    facts = model_facts(written(tmp_path, {"model_type": "gpt_neox", **TINY}), "x")
    assert facts.architecture == "GPTNeoXForCausalLM"
    assert facts.linear_names == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    assert (facts.gated, facts.norms, facts.tied, facts.intermediate) == (False, 2, False, 80)


def test_experts_are_counted(shared: Path, tmp_path: Path) -> None:
    config = json.loads((shared / "configs" / "mixtral-8x7b-v0.1.config.json").read_text())
    facts = model_facts(written(tmp_path, config), "mixtral")
    assert (facts.experts, facts.parameters) == (8, 46_702_792_704)
    assert facts.linear_names == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_parts_add_up_to_the_whole() -> None:
    for kind in FAMILIES:
        facts = facts_of({"model_type": kind, **TINY, "num_key_value_heads": 2}, "x")
        assert facts is not None
        head = 0 if facts.tied else facts.head_parameters
        whole = facts.layers * facts.block_parameters + facts.embedding_parameters + head + facts.hidden
        assert facts.parameters == whole
        assert facts.block_shapes * facts.layers == facts.linear_shapes
        assert facts.lora_parameters(4, facts.linear_names) == 4 * sum(a + b for _, a, b in facts.linear_shapes)


@pytest.mark.parametrize(
    "text, number",
    [
        ("{}", 5),
        ("not json", 5),
        ("[1]", 5),
        ('{"model_type": "no_such_model"}', 5),
        ('{"model_type": "vit"}', 6),
        ('{"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 32}', 6),
    ],
)
def test_fault_058_a_config_that_is_no_causal_model_is_refused(text: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        model_facts(tmp_path, "x")
    assert caught.value.number == number
    assert caught.value.fix
    if number == 6:
        assert "llama" in caught.value.fix and "gpt2" in caught.value.fix
