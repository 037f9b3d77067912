"""The benchmarks' arithmetic and their choice of documents; what they measure is not tested here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from families import SHARED
from freeze import IGNORED, Document, describe, usable
from frozen_model import build_tokenizer
from llm_finetune_kit.models.facts import ModelFacts, facts_by_name
from shapes import SHAPES, Lengths, counts, flops_per_token, lora_settings
from speed import ROOT, parse

real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder with real data is not here")


def facts(name: str) -> ModelFacts:
    found = facts_by_name(name)
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "gigaflops"), [("gpt2", 0.54), ("tinyllama", 4.35), ("llama-3.1-8b", 30.7)])
def test_operations_of_a_token_follow_from_the_models_own_sizes(name: str, gigaflops: float) -> None:
    """Worked out by hand for documents of 512 tokens, all of them learned: 4 (N + Nh) + 6 A + 6 L q S."""
    frozen = {**counts(facts(name)), "supervised_share": 1.0, "length_of_a_token": 512}
    assert flops_per_token(frozen) == pytest.approx(gigaflops * 1e9, rel=0.01)
    masked = flops_per_token({**frozen, "supervised_share": 0.0})
    assert flops_per_token(frozen) - masked == pytest.approx(4 * frozen["head_weights"])


def test_a_token_stands_in_a_long_document_more_often_than_in_a_short_one() -> None:
    documents = [([0] * length, [1] * length) for length in (10, 30)]
    found = describe(documents, 1, Lengths(1, 40, 2))
    assert (found["length_mean"], found["length_of_a_token"], found["max_length"]) == (20, 25, 40)
    assert (found["useful_share_max_length"], found["useful_share_dynamic"]) == (40 / 80, 40 / 60)


def document(prompt: int, answer: int) -> Document:
    return [*range(prompt + answer)], [IGNORED] * prompt + [*range(answer)]


def test_documents_keep_within_their_lengths_and_always_teach_something() -> None:
    offered = [document(2, 1), document(4, 4), document(4, 9), document(12, 3)]
    cut = [(len(ids), len(labels)) for ids, labels in usable(iter(offered), Lengths(4, 10, 1), cut=True)]
    whole = [(len(ids), len(labels)) for ids, labels in usable(iter(offered), Lengths(4, 10, 1), cut=False)]
    assert cut == [(8, 8), (10, 10)] and whole == [(8, 8)]


def test_lora_is_on_every_linear_layer_of_the_blocks() -> None:
    gpt2, llama = lora_settings(facts("gpt2")), lora_settings(facts("tinyllama"))
    assert gpt2["target_modules"] == ["c_attn", "c_proj", "c_fc"] and gpt2["fan_in_fan_out"]
    assert len(llama["target_modules"]) == 7 and not llama["fan_in_fan_out"]


def test_every_shape_and_set_has_results_of_its_own() -> None:
    assert parse([]).out == ROOT / ".bench/speed/gpt2-alpaca"
    asked = parse(["--shape", "tinyllama", "--lengths", "long", "--out", "x"])
    assert asked.out == Path("x/tinyllama-long")


@real_data
@pytest.mark.parametrize("name", SHAPES)
def test_documents_are_never_longer_than_a_model_has_positions(name: str) -> None:
    shape = SHAPES[name]
    folder = SHARED / "configs" / shape.config if shape.config else ROOT / "src/llm_finetune_kit/assets/demo/config.json"
    config = json.loads(folder.read_text())
    positions = config.get("n_positions") or config["max_position_embeddings"]
    assert all(lengths.least <= lengths.most <= positions for lengths in shape.lengths.values())


@real_data
def test_llamas_tokenizer_is_rebuilt_from_its_pieces() -> None:
    """The ids are those of the documentation of transformers' LlamaTokenizer."""
    tokenizer = build_tokenizer(SHAPES["tinyllama"], SHARED)
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    text = "a\n\nbird 🐦 sings"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) == 32000 and tokenizer.pad_token == "</s>"
