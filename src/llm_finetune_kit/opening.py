"""Opening a model to use it: a base model, a tuned one, or an adapter on its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_finetune_kit.errors import ModelError
from llm_finetune_kit.folder import MANIFEST, find_result, read_json
from llm_finetune_kit.models.adapters import base_of_adapter, load_adapter
from llm_finetune_kit.models.loading import DTYPES, load_base
from llm_finetune_kit.models.locate import Located, locate
from llm_finetune_kit.models.tokenizer import ChatTokenizer, load_tokenizer
from llm_finetune_kit.training.step import Objective


@dataclass(frozen=True)
class Opened:
    """A model ready to answer and to be measured; `is_adapter` says that its base can be had by switching it off."""

    name: str
    model: Any
    chat: ChatTokenizer
    objective: Objective
    is_adapter: bool


def open_model(where: str, *, dtype: str, device: str = "cpu") -> Opened:
    """The model at `where`: a known name, hub id, model folder, adapter folder, run folder or `outputs/final`."""
    folder = find_result(where)
    base = base_of_adapter(folder)
    if base is None:
        located = locate(str(folder) if folder.is_dir() else where)
        model = load_base(located, dtype, device)
        chat = load_tokenizer(located.folder)
    else:
        model = load_adapter(load_base(_base(folder, base), dtype, device), folder)
        chat = load_tokenizer(folder)
    return Opened(where, model, chat, Objective(model, DTYPES[dtype]), base is not None)


def _base(folder: Path, recorded: str) -> Located:
    """The adapter's base, by the name its manifest gives or else by what adapter_config.json records."""
    names = [recorded]
    if (folder / MANIFEST).is_file():
        names.insert(0, str(read_json(folder / MANIFEST).get("base_model", recorded)))
    for name in names:
        try:
            return locate(name)
        except ModelError as error:
            fault = error
    raise ModelError(
        24, f"its base model {names[0]} is not here", where=str(folder), why=fault.problem, fix="put the base model where it was"
    )
