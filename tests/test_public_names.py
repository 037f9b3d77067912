"""Every public name: what its document promises of it, and the example in its docstring, run."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import llm_finetune_kit as kit

# What the documents of the three systems name, with the parameters that they show, in their order.
PROMISED: dict[str, list[str]] = {
    "load_model": [],
    "get_available_models": [],
    "estimate_training_time": [],
    "load_dataset": [],
    "prepare_dataset": ["dataset", "tokenizer"],
    "load_sample_dataset": [],
    "get_dataset_stats": [],
    "SimpleTrainer": ["model", "tokenizer"],
    "QuickTrainer": [],
    "ProgressCallback": [],
    "evaluate_model": [],
    "compare_models": [],
    "calculate_perplexity": [],
    "benchmark_speed": [],
    "ModelConfig": ["model_name", "use_4bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "use_nested_quant", "cache_dir"],
    "LoRAConfig": ["r", "lora_alpha", "target_modules", "lora_dropout", "bias", "task_type"],
    "DataConfig": ["dataset_name"],
    "TrainingConfig": [],
    "EvaluationConfig": [],
    "LLAMATrainer": ["model_config", "lora_config", "data_config", "training_config", "eval_config"],
    "AlpacaDatasetLoader": ["tokenizer", "max_length"],
    "DailyDialogDatasetLoader": ["tokenizer", "max_length"],
    "PerplexityEvaluator": ["model", "tokenizer"],
    "QualitativeEvaluator": ["model", "tokenizer"],
    "EvaluationFramework": ["model", "tokenizer"],
}
DEFAULTS = {
    "ModelConfig": {"use_4bit": True},
    "LoRAConfig": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM"},
    "QualitativeEvaluator.generate_response": {"max_length": 256, "temperature": 0.7, "top_p": 0.9, "num_beams": 4},
}
WITHOUT_EXAMPLE = {"Result"}  # what run() gives; shown there


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_name_takes_what_its_document_shows(name: str) -> None:
    taken = list(inspect.signature(getattr(kit, name)).parameters)
    assert taken[: len(PROMISED[name])] == PROMISED[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_document(name: str) -> None:
    head, _, method = name.partition(".")
    taken = inspect.signature(getattr(getattr(kit, head), method) if method else getattr(kit, head)).parameters
    assert {one: taken[one].default for one in DEFAULTS[name]} == DEFAULTS[name]


def test_names_are_sorted_and_all_there() -> None:
    assert kit.__all__ == sorted(kit.__all__) and set(PROMISED) <= set(kit.__all__)
    assert (Path(kit.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", [name for name in kit.__all__ if name not in WITHOUT_EXAMPLE])
def test_the_example_of_a_docstring_is_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {one: getattr(kit, one) for one in kit.__all__}
    own = doctest.DocTestFinder(recurse=False).find(getattr(kit, name), name, extraglobs=known)
    assert own and own[0].examples, "a public name shows how it is used"
    told: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(own[0], out=told.append).failed
    assert not failed, "".join(told)
