"""LLM Finetune Kit: fine-tune open language models, with evidence that it worked.

Names load on first use, so importing the package is free.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOME = {
    "AlpacaDatasetLoader": "classic",
    "DailyDialogDatasetLoader": "classic",
    "DataConfig": "classic_config",
    "EvaluationConfig": "classic_config",
    "EvaluationFramework": "classic",
    "GenerationSection": "config",
    "KitError": "errors",
    "LLAMATrainer": "classic",
    "LoRAConfig": "classic_config",
    "ModelConfig": "classic_config",
    "PerplexityEvaluator": "classic",
    "ProgressCallback": "trainers",
    "QualitativeEvaluator": "classic",
    "QuickTrainer": "trainers",
    "Result": "run",
    "RunConfig": "config",
    "SimpleTrainer": "trainers",
    "TrainingConfig": "classic_config",
    "benchmark_speed": "api_evaluate",
    "calculate_perplexity": "api_evaluate",
    "compare_models": "api_evaluate",
    "estimate_training_time": "api",
    "evaluate_model": "api_evaluate",
    "generate": "api",
    "get_available_models": "api",
    "get_dataset_stats": "api",
    "load_config": "settings",
    "load_dataset": "api",
    "load_model": "api",
    "load_sample_dataset": "api",
    "make_plan": "plan",
    "prepare_dataset": "api",
    "resume": "run",
    "run": "run",
    "stream": "api",
    "tune": "tuning.search",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Door(ModuleType):
    """Importing the submodule `run` must not hide the function `run`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
