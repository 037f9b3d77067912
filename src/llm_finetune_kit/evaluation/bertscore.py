"""BERTScore, by the package bert-score (an extra); its model comes from the hub or from a local folder."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from llm_finetune_kit.errors import MachineError

MODEL = "roberta-large"  # what the paper's figures for English are made with


def bertscore_rows(predictions: list[str], references: list[str]) -> list[float]:
    """F1 of each row. Raises MachineError where the package is missing."""
    _, _, f1 = _package().score(predictions, references, model_type=MODEL, rescale_with_baseline=False)
    return [float(value) for value in f1]


def bertscore_signature() -> str:
    """Raises MachineError where the package is missing."""
    _package()
    return f"bert-score|F1, mean over rows|model:{MODEL}|rescaled:no|version:{version('bert-score')}"


def _package() -> Any:
    try:
        return import_module("bert_score")
    except ImportError:
        fix = "pip install 'llm-finetune-kit[bertscore]'"
        raise MachineError(40, "the package bert-score is missing", where="metric bertscore", fix=fix) from None
