"""The benchmarks' arithmetic and their choice of documents; what they measure is not tested here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from litgpt_names import from_peft, to_peft
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from probe import documents_of
from transformers import LlamaConfig, LlamaForCausalLM

import scaling_page
from families import SHARED
from freeze import IGNORED, Document, describe, usable
from frozen_model import build_tokenizer
from llm_finetune_kit.models.facts import ModelFacts, facts_by_name
from scaling import PANELS, Measured, turns
from shapes import SHAPES, Lengths, counts, flops_per_token, lora_settings
from speed import ROOT, check_environments, parse

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


def test_a_library_that_does_not_know_a_shape_is_left_out() -> None:
    names = {shape: [contender.name for contender in parse(["--shape", shape]).contenders] for shape in SHAPES}
    assert "litgpt_best" in names["tinyllama"] and "litgpt_best" not in names["gpt2"]
    assert all("unsloth_best" in found and "ours" in found for found in names.values())


def test_a_contender_without_its_environment_is_named_before_anything_runs(tmp_path: Path) -> None:
    asked = parse(["--environments", str(tmp_path), "--contenders", "ours", "unsloth_best"])
    with pytest.raises(SystemExit, match=r"unsloth_best needs .*venv-unsloth/bin/python.*make .bench/venv-unsloth/.ready"):
        check_environments(asked)
    check_environments(parse(["--environments", str(tmp_path), "--contenders", "ours"]))


def test_an_adapter_comes_back_from_litgpts_names_as_it_went() -> None:
    """Q has more outputs than k and v, as in grouped attention; every weight is another."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    lora = LoraConfig(r=3, target_modules=lora_settings(facts("tinyllama"))["target_modules"], init_lora_weights=False)
    adapter = get_peft_model_state_dict(get_peft_model(model, lora))
    there = from_peft(adapter, layers=2)
    back = to_peft(there | {"lm_head.weight": torch.zeros(1)}, layers=2, outputs=[16, 8, 8])
    assert there["transformer.h.1.attn.qkv.lora_A"].shape == (9, 16) and there["transformer.h.1.attn.qkv.lora_B"].shape == (32, 3)
    assert back.keys() == adapter.keys() and all(torch.equal(back[name], adapter[name]) for name in adapter)


def test_documents_are_read_off_a_packed_row_without_what_fills_it_up() -> None:
    row = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 0, 0]]),
        "labels": torch.tensor([[IGNORED, 6, IGNORED, 8, 9, IGNORED, IGNORED]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 0]]),
    }
    expected = [((5, 6), (IGNORED, 6)), ((7, 8, 9), (IGNORED, 8, 9))]
    assert documents_of(row) == expected
    assert documents_of({**row, "attention_mask": torch.zeros(1, 1, 7, 7)}) == expected


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


# --- how it scales -----------------------------------------------------------------------------------------


def test_a_point_that_stands_in_two_panels_is_measured_once_a_repeat_and_in_another_order_each_time() -> None:
    found = turns(PANELS, 3)
    keys, points = [key for key, _ in found], {point for panel in PANELS.values() for point in panel}
    assert len(set(keys)) == len(keys) == 3 * len(points)
    thirds = [[point for _, point in found[start : start + len(points)]] for start in range(0, len(found), len(points))]
    assert all(set(third) == points for third in thirds) and thirds[0] != thirds[1]
    assert turns(PANELS, 3) == found  # a run that goes on asks for the same


def test_what_was_measured_is_there_when_the_run_goes_on(tmp_path: Path) -> None:
    Measured(tmp_path / "found").keep("a", seconds=1.5)
    Measured(tmp_path / "found").keep("b", seconds=2.5)
    again = Measured(tmp_path / "found")
    assert "a" in again and "c" not in again and again.found["b"]["seconds"] == 2.5


def test_growth_is_that_of_the_settled_steps() -> None:
    assert scaling_page.growth([500, 700, 100, *(200 + 0.03 * step for step in range(50))], 3) == pytest.approx(3.0)


def test_the_page_and_the_picture_show_every_point_with_all_its_repeats() -> None:
    panels = {name: [asdict(point) for point in points] for name, points in PANELS.items()}
    quiet, noisy = {"peak_mib": 1234.0, "foreign_load": 0.1}, {"peak_mib": 1234.0, "foreign_load": 0.9}
    found = {
        key: {**asdict(point), "tokens_per_second": 100.0 + index, **(noisy if key.endswith("2x128-2t 1") else quiet)}
        for index, (key, point) in enumerate(turns(PANELS, 2))
    }
    found["long run"] = {"held_mib": [100.0] * 60, "foreign_load": 0.0}
    for key in ("preparation", "preparation of many"):
        found[key] = {"rows": 9, "file_mb": 1.0, "seconds": 2.0, "peak_mib": 3.0, "examples": 8, "foreign_load": 0.0}
    facts = {"date": "today", "command": "python", "machine": {"cpu": "one", "cores": 2, "flags": [], "memory_gib": 24}}
    page = scaling_page.page(facts, panels, found)
    assert page.count("| 1,234 |") == sum(map(len, PANELS.values())) and "+0.0 MiB per 100 steps" in page.replace("-0.0", "+0.0")
    assert page.count("not a record") == 1 and "gpt2-2x128-2t 1" in page
    picture = scaling_page.picture(panels, found)
    assert picture.startswith("<?xml") and all(title in picture for title in scaling_page.TITLES.values())
    assert picture == scaling_page.picture(panels, found)
