"""The catalog: every model's size is what its shape adds up to, and what transformers builds from it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llm_finetune_kit.catalog import GUIDANCE, MODELS, SHAPES, SHORT_NAMES, short_name
from llm_finetune_kit.models.facts import facts_by_name, facts_of_model
from llm_finetune_kit.models.known import rows
from llm_finetune_kit.models.locate import check_name, demo_folder

PUBLISHED = {  # by the model cards, or by the sizes of their weight files
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "tinyllama": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "phi-3-mini": 3_821_079_552,
    "qwen2.5-0.5b": 494_032_768,
    "gemma-2-2b": 2_614_341_888,
    "mistral-7b": 7_248_023_552,
    "gemma-3-1b": 999_885_952,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.parametrize("name", MODELS)
def test_each_shape_adds_up_to_the_stated_size_and_to_the_real_model(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = facts_by_name(name)
    assert facts is not None
    assert facts.parameters == MODELS[name].parameters
    assert facts.parameters == PUBLISHED.get(name, facts.parameters)
    shape = dict(SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
    assert facts_of_model(model, name) == facts


def test_catalog_shapes_agree_with_published_config_files(shared) -> None:
    """Of the values that decide sizes; the collected Llama 2 files give half its real positions."""
    files = {
        "gpt2": "gpt2",
        "gpt2-medium": "gpt2-medium",
        "tinyllama": "tinyllama-1.1b-chat-v1.0",
        "llama-3.1-8b": "llama-3.1-8b",
        "llama-3.2-1b": "llama-3.2-1b",
        "llama-3.2-3b": "llama-3.2-3b",
        "llama-2-7b": "llama-2-7b",
        "llama-2-13b": "llama-2-13b",
        "mistral-7b": "mistral-7b-v0.3",
        "phi-3-mini": "phi-3-mini-4k-instruct",
        "phi-3.5-mini": "phi-3.5-mini",
        "qwen2.5-0.5b": "qwen2-0.5b",
        "qwen2.5-3b": "qwen2.5-3b",
        "qwen3-0.6b": "qwen3-0.6b",
        "gemma-2-2b": "gemma-2-2b",
        "gemma-3-1b": "gemma-3-1b-it",
        "smollm2-135m": "smollm2-135m",
        "smollm2-360m": "smollm2-360m",
        "olmo-2-7b": "olmo-2-7b",
    }
    for name, stem in files.items():
        published = json.loads((shared / "configs" / f"{stem}.config.json").read_text())
        wrong = {
            key: (value, published[key])
            for key, value in SHAPES[name].items()
            if key in published
            and value != published[key]
            and not (name.startswith("llama-2") and key == "max_position_embeddings")
        }
        assert wrong == {}, name


def test_the_demo_model_is_described_as_it_is() -> None:
    stored = json.loads((demo_folder() / "config.json").read_text())
    assert {key: stored[key] for key in SHAPES["demo"]} == SHAPES["demo"]


def test_every_spelling_leads_to_a_model() -> None:
    assert set(SHAPES) == set(MODELS)
    assert not set(SHORT_NAMES) & set(MODELS)
    for spelling, short in SHORT_NAMES.items():
        assert short_name(spelling) == short_name(spelling.upper()) == short
        assert check_name(spelling) == MODELS[short].hub_id
    for short, model in MODELS.items():
        assert short_name(short) == short
        assert not model.hub_id or short_name(model.hub_id.lower()) == short
    assert short_name("nobody/knows") is None
    assert facts_by_name("") is None


@pytest.mark.parametrize(
    "name, minimum, recommended, quantization",
    [
        ("gpt2", 4, 8, "optional"),
        ("phi-3-mini", 8, 16, "optional"),
        ("mistral-7b", 12, 24, "required"),
        ("llama-3.1-8b", 16, 24, "required"),
        ("llama-13b", 16, 40, "required"),
    ],
)
def test_memory_guidance(name: str, minimum: int, recommended: int, quantization: str) -> None:
    memory = MODELS[name].memory
    assert (memory.minimum_gb, memory.recommended_gb, memory.quantization) == (minimum, recommended, quantization)


def test_guidance_grows_with_size() -> None:
    for column in ("minimum_gb", "recommended_gb"):
        values = [getattr(guidance, column) for _, guidance in GUIDANCE]
        assert values == sorted(values)
    assert [most for most, _ in GUIDANCE] == sorted(most for most, _ in GUIDANCE)


def test_rows_of_the_models_table_are_plain_values_from_small_to_large() -> None:
    table = rows()
    assert {row["name"] for row in table} == set(MODELS)
    assert [row["parameters"] for row in table] == sorted(row["parameters"] for row in table)
    assert json.loads(json.dumps(table)) == table
    mistral = next(row for row in table if row["name"] == "mistral-7b")
    assert mistral["gated"] and mistral["template"] == "mistral" and mistral["recommended_gb"] == 24
    assert "fits" not in mistral


def test_rows_say_what_fits_a_machine() -> None:
    from llm_finetune_kit.hardware import this_machine

    machine = this_machine()
    fits = {row["name"]: row["fits"] for row in rows(machine)}
    assert set(fits.values()) <= {"LoRA", "with recompute", "QLoRA", "no"}
    if machine.free_memory > 4e9:
        assert fits["demo"] == "LoRA"
    if machine.free_memory < 12e9:
        assert fits["llama-13b"] == "no"


def test_facts_of_a_known_model_need_no_torch_and_no_time() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from llm_finetune_kit.models.facts import facts_by_name\n"
        "print(facts_by_name('mistral-7b').parameters, time.process_time() - start)\n"
        "print(*{'torch', 'transformers', 'huggingface_hub', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (parameters, seconds), heavy = (line.split() for line in done.stdout.splitlines())
    assert int(parameters) == 7_248_023_552
    assert float(seconds) < 0.5
    assert heavy == []
