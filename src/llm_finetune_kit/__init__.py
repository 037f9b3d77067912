"""LLM Finetune Kit: fine-tune open language models, with evidence that it worked.

Names load on first use, so importing the package is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "KitError": "errors",
    "QuickTrainer": "api",
    "Result": "run",
    "RunConfig": "config",
    "SimpleTrainer": "api",
    "get_available_models": "api",
    "load_config": "settings",
    "load_dataset": "api",
    "load_model": "api",
    "load_sample_dataset": "api",
    "make_plan": "plan",
    "prepare_dataset": "api",
    "resume": "run",
    "run": "run",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # also over the submodule of the same name that the import has just bound here
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
