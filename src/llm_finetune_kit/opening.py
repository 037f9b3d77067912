"""Opening a model to use it: a base model, a tuned one, or an adapter on its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.files import MANIFEST, read_json
from llm_finetune_kit.hardware import this_machine
from llm_finetune_kit.models.adapters import base_of_adapter, load_adapter
from llm_finetune_kit.models.loading import DTYPES, load_base
from llm_finetune_kit.models.locate import Located, locate
from llm_finetune_kit.models.tokenizer import ChatTokenizer, load_tokenizer
from llm_finetune_kit.runs import find_result
from llm_finetune_kit.training.step import Objective

AS_TRAINED = "as trained"


@dataclass(frozen=True)
class Opened:
    """A model ready to answer and to be measured; `is_adapter` says that its base can be had by switching it off."""

    name: str
    model: Any
    chat: ChatTokenizer
    objective: Objective
    is_adapter: bool
    base: Located | None = None  # where an adapter's base was found


def open_model(where: str, *, dtype: str, device: str = "cpu", quantization: str | None = AS_TRAINED) -> Opened:
    """The model at `where`: a known name, hub id, model folder, adapter folder, run folder or `outputs/final`.

    `quantization` is nf4, fp4, int8, None (full precision), or "as trained": that of the base the adapter was trained on.
    """
    folder = find_result(where)
    base = base_of_adapter(folder)
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    how = _quantized(manifest if base is not None else {}, quantization)
    if base is None:
        located = locate(str(folder) if folder.is_dir() else where)
        model = load_base(located, dtype, device, **how)
        chat = load_tokenizer(located.folder)
    else:
        located = base_located(folder, base, manifest)
        model = load_adapter(load_base(located, dtype, device, **how), folder)
        chat = load_tokenizer(folder)
    objective = Objective(model, DTYPES[dtype])
    return Opened(where, model, chat, objective, base is not None, None if base is None else located)


def open_here(where: str, dtype: str | None = None) -> Opened:
    """The model at `where` on this machine's device, by default in the number format that it computes fastest."""
    machine = this_machine()
    return open_model(where, dtype=dtype or ("bfloat16" if machine.bfloat16 else "float32"), device=machine.device)


def opened(model: Any, tokenizer: Any) -> Opened:
    """A model that is in memory already, with its tokenizer, in the number format of its embeddings."""
    objective = Objective(model, model.get_input_embeddings().weight.dtype)
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return Opened(name, model, ChatTokenizer(tokenizer), objective, hasattr(model, "disable_adapter"))


def _quantized(manifest: dict[str, Any], asked: str | None) -> dict[str, Any]:
    """How the base is to be loaded; `manifest` holds what `quantization_facts` said when the adapter was saved."""
    facts = manifest.get("quantization") or {}
    return {
        "quantization": facts.get("type") if asked == AS_TRAINED else asked,
        "double_quantization": bool(facts.get("double_quantization", True)),
    }


def base_located(folder: Path, recorded: str, manifest: dict[str, Any]) -> Located:
    """The adapter's base, by the name its manifest gives or else by what adapter_config.json records.

    Raises ModelError where neither is here.
    """
    for name in (str(manifest.get("base_model", recorded)), recorded):
        try:
            return locate(name)
        except ModelError as error:
            fault, missing = error, name
    problem = f"its base model {missing} is not here"
    raise ModelError(24, problem, where=str(folder), why=fault.problem, fix="put the base model where it was")
