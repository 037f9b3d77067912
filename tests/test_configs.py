"""The shipped configs hold the values they promise, and each can be planned from facts alone: no model, no data, no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.hardware import machine_named
from llm_finetune_kit.models.facts import facts_by_name
from llm_finetune_kit.plan import DataFacts, make_plan
from llm_finetune_kit.settings import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DATA = DataFacts(examples=2000, held_out=200, tokens=400_000, target_tokens=200_000, longest=512)

DIALOGUE: dict[str, Any] = {
    "method": "lora",
    "model.max_length": 512,
    "model.dtype": "float16",
    "model.quantization": "nf4",
    "model.double_quantization": True,
    "lora.dropout": 0.05,
    "lora.bias": "none",
    "data.train_file": "daily_dialog",
    "training.num_epochs": 3,
    "training.learning_rate": 2e-4,
    "training.weight_decay": 0.01,
    "training.warmup_ratio": 0.03,
    "training.max_grad_norm": 0.3,
    "training.optimizer": "paged_adamw",
    "training.schedule": "cosine",
    "evaluation.generation.max_new_tokens": 256,
    "evaluation.generation.num_beams": 4,
    "evaluation.generation.temperature": 0.7,
    "evaluation.generation.top_p": 0.9,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMISED: dict[str, dict[str, Any]] = {
    "gpt2": {"model.name": "gpt2", "training.max_steps": 100, "data.train_file": "sample:chat"},
    "mistral_7b": {
        "model.name": "mistral-7b",
        "model.quantization": "nf4",
        "training.max_steps": 500,
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 4,
        "data.train_file": "databricks/databricks-dolly-15k",
    },
    "llama3_8b": {
        "model.name": "llama-3.1-8b",
        "model.quantization": "nf4",
        "training.max_steps": 1000,
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 4,
    },
    "llama_7b_dialogue": DIALOGUE
    | {
        "model.name": "huggyllama/llama-7b",
        "lora.r": 8,
        "lora.alpha": 16,
        "lora.target_modules": ["q_proj", "v_proj"],
        "training.batch_size": 4,
        "training.gradient_accumulation_steps": 4,
    },
    "llama_13b_dialogue": DIALOGUE
    | {
        "model.name": "huggyllama/llama-13b",
        "lora.r": 16,
        "lora.alpha": 32,
        "lora.target_modules": ATTENTION,
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 8,
    },
    "tinyllama_lora": {
        "model.name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "model.dtype": "float16",
        "lora.r": 8,
        "lora.alpha": 16,
        "lora.dropout": 0.05,
        "lora.target_modules": ATTENTION,
        "data.train_file": "alpaca",
        "data.max_samples": 1000,
        "data.loss_on": "answers",
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 8,
        "training.max_steps": 500,
        "training.learning_rate": 2e-4,
        "training.warmup_steps": 50,
        "output.run_name": "exp1",
    },
}


def get(config: RunConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("name", PROMISED)
def test_a_shipped_config_holds_the_values_it_promises(name: str) -> None:
    config, notes = load_config(CONFIGS / f"{name}.yaml")
    assert {path: get(config, path) for path in PROMISED[name]} == PROMISED[name]
    assert notes == []


@pytest.mark.parametrize("name", PROMISED)
def test_a_shipped_config_is_planned_from_facts_alone(name: str) -> None:
    config, _ = load_config(CONFIGS / f"{name}.yaml")
    facts = facts_by_name(str(config.model.name))
    assert facts is not None, "the model is one of the catalog"
    plan = make_plan(config, machine_named("A100-80"), facts, DATA)
    targets = plan.config.lora.target_modules
    assert isinstance(targets, list) and set(targets) <= set(facts.linear_names)
    assert plan.trained_parameters == facts.lora_parameters(plan.config.lora.r, targets)
    assert plan.steps == (config.training.max_steps or 3 * DATA.examples // 16)
    assert 0 < plan.peak_memory <= plan.available_memory
    for path in PROMISED[name]:
        assert get(plan.config, path) == PROMISED[name][path], "the plan overrules nothing that was asked for"


@pytest.mark.parametrize(
    "name, limit",
    [
        ("gpt2", 4e9),
        ("tinyllama_lora", 8e9),
        ("mistral_7b", 10e9),
        ("llama3_8b", 12e9),
        ("llama_7b_dialogue", 10e9),
        ("llama_13b_dialogue", 16e9),
    ],
)
def test_a_shipped_config_is_estimated_to_fit_a_small_gpu(name: str, limit: float) -> None:
    config, _ = load_config(CONFIGS / f"{name}.yaml")
    small = replace(machine_named("T4"), memory=int(limit), free_memory=int(limit))
    plan = make_plan(config, small, facts_by_name(str(config.model.name)), DATA)
    assert plan.peak_memory < limit


def test_every_shipped_config_has_a_comment_for_its_reader() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path.name
