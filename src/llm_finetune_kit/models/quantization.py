"""Base models in 4 or 8 bits through bitsandbytes, which is imported only when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from threading import RLock
from typing import Any

from llm_finetune_kit.errors import MachineError

# Faults of this module:  MACHINE 30 bitsandbytes missing   31 bitsandbytes broken

KINDS = ("nf4", "fp4", "int8")
LIBRARY = "bitsandbytes"
_importing = RLock()


def require_bitsandbytes() -> None:
    """Raise MachineError if bitsandbytes is not there or cannot be loaded."""
    with _importing:
        if find_spec(LIBRARY) is None:
            fix = "pip install 'llm-finetune-kit[quantization]'"
            raise MachineError(30, "quantization needs bitsandbytes, which is not installed", where="model.quantization", fix=fix)
        _import()


def _import() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a broken build raises whatever its loader meets
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fix = "pip install --force-reinstall bitsandbytes, or train without model.quantization"
        raise MachineError(31, "bitsandbytes cannot be loaded", where="model.quantization", why=said, fix=fix) from error


@contextmanager
def only_if_loaded() -> Iterator[None]:
    """Within the block PEFT does not find bitsandbytes unless a packed model has loaded it already.

    PEFT imports it, and with it torch's compiler, for every model: a second of each start.
    """
    with _importing:
        if LIBRARY in sys.modules:
            yield
            return
        sys.modules[LIBRARY] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules[LIBRARY]
            from peft import import_utils

            import_utils.is_bnb_available.cache_clear()
            import_utils.is_bnb_4bit_available.cache_clear()


def loading_settings(kind: str, double: bool, dtype: Any) -> Any:
    """transformers' settings that pack a model while it is loaded: linear layers of the blocks, not embeddings and head."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )


def quantization_facts(model: Any) -> dict[str, Any]:
    """How the base of a loaded model is quantized, for a manifest; empty if it is not."""
    from importlib.metadata import version

    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return {}
    four = settings.load_in_4bit
    return {
        "type": settings.bnb_4bit_quant_type if four else "int8",
        "double_quantization": bool(four and settings.bnb_4bit_use_double_quant),
        "compute_dtype": str(model.dtype).removeprefix("torch."),
        "library": f"bitsandbytes {version('bitsandbytes')}",
    }


def plain_weight(layer: Any, dtype: Any) -> Any:
    """The weight [out, in] of a packed or ordinary linear layer, as a tensor of `dtype`."""
    from llm_finetune_kit.models import quantized_layers

    return quantized_layers.plain_weight(layer, dtype)
