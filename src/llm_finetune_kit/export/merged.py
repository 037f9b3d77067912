"""An adapter merged into its base: one model folder that every program reading transformers' layout loads, PEFT or not."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_finetune_kit.beginning import RESOLVED
from llm_finetune_kit.errors import MachineError, ModelError, UsageError
from llm_finetune_kit.evaluation.asking import general_tokens
from llm_finetune_kit.files import MANIFEST, commit, damage, read_json, write_whole
from llm_finetune_kit.hardware import versions
from llm_finetune_kit.models.adapters import base_of_adapter
from llm_finetune_kit.models.facts import model_facts
from llm_finetune_kit.models.loading import DTYPES
from llm_finetune_kit.opening import Opened, base_located, open_model
from llm_finetune_kit.report.card import loading_code
from llm_finetune_kit.runs import find_result
from llm_finetune_kit.training.saving import CARD

PROBE = 128  # tokens whose logits are compared before and after merging
# How far the merged model's logits may be from the adapter's, as a share of their size: rounding, and no more.
LIMIT = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


@dataclass(frozen=True)
class Exported:
    """A merged model: where, its bytes and number format, and the largest difference of its logits on the probe's tokens
    from the adapter's, with the largest logit beside it; `quantized` is what the base was while the adapter learned."""

    folder: Path
    size_bytes: int
    dtype: str
    difference: float
    largest: float
    quantized: str | None


def export_merged(where: str, out: Path, *, dtype: str | None = None, overwrite: bool = False) -> Exported:
    """Write the adapter at `where` (a run, its final/ or a checkpoint), merged into its base, to the folder `out`.

    Weights are in `dtype`, by default that of the adapter's training. Nothing of `where` is touched, and `out` holds all
    or nothing of it. Raises UsageError, ModelError or MachineError.
    """
    source = find_result(where)
    facts = _checked(where, source, out, overwrite)
    dtype = dtype or _as_trained(source)
    _check_room(source, facts, DTYPES[dtype], out)
    opened = open_model(where, dtype=dtype, quantization=None)
    before = _logits(opened)
    merged = opened.model.merge_and_unload(safe_merge=True)
    after = _logits(Opened(opened.name, merged, opened.chat, opened.objective, False))
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if float((after - before).norm()) > LIMIT[dtype] * float(before.norm()):
        problem = f"the merged model's logits are up to {difference:.3g} from the adapter's"
        raise ModelError(42, problem, where=where, why="that is more than rounding", fix="try --dtype float32")
    about = {name: facts[name] for name in ("base_model", "step") if name in facts} | {"versions": versions()}

    def write(draft: Path) -> None:
        merged.save_pretrained(draft)
        opened.chat.save(draft)
        write_whole(draft / CARD, _card(source, dtype))

    try:
        size = commit(out, write, about)
    except OSError as error:
        raise MachineError(18, f"cannot be written: {error.strerror}", where=str(out), fix="free some disk space") from error
    return Exported(out, size, dtype, difference, largest, (facts.get("quantization") or {}).get("type"))


def _checked(where: str, source: Path, out: Path, overwrite: bool) -> dict[str, Any]:
    """The manifest of the adapter, once it is known to be one and sound, and that `out` may be written."""
    if not source.is_dir() or base_of_adapter(source) is None:
        why = "a model that was trained whole is in transformers' layout already" if source.is_dir() else ""
        raise ModelError(43, "it is no adapter, so there is nothing to merge", where=where, why=why, fix="name a run with LoRA")
    sealed = (source / MANIFEST).is_file()
    if sealed and (reason := damage(source)):
        fix = "name a sound checkpoint of the run, or train again"
        raise ModelError(44, f"the adapter cannot be trusted: {reason}", where=str(source), fix=fix)
    own, target = source.resolve(), out.resolve()
    if target == own or own.is_relative_to(target) or target.is_relative_to(own):
        raise UsageError(60, "the merged model would replace its adapter", where=f"--out {out}", fix="name another folder")
    if out.exists() and not (overwrite and (out / MANIFEST).is_file()):
        what = "--overwrite replaces only a folder that this command wrote" if overwrite else "there is something already"
        raise UsageError(61, what, where=f"--out {out}", fix="name a new folder, or add --overwrite for an earlier export")
    if not out.parent.is_dir():
        raise UsageError(62, "its parent folder does not exist", where=f"--out {out}", fix="make it, or name another place")
    return dict(read_json(source / MANIFEST)) if sealed else {}


def _as_trained(source: Path) -> str:
    """The number format of the run's matrix products, and float32 where no run stands around the adapter."""
    record = source.parent / RESOLVED
    if not record.is_file():
        return "float32"
    return str(read_json(record)["config"]["model"]["dtype"] or "float32")


def _check_room(source: Path, facts: dict[str, Any], dtype: torch.dtype, out: Path) -> None:
    """Raises MachineError where the disk has no room for the merged weights, before any are loaded."""
    base = base_located(source, str(base_of_adapter(source)), facts)
    needed = model_facts(base.folder, base.name, trusted=base.trusted).parameters * dtype.itemsize
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        problem = f"needs about {needed / 1e6:,.0f} MB of disk and {free / 1e6:,.0f} MB are free"
        raise MachineError(18, problem, where=str(out), fix="free some, or export to another disk")


@torch.no_grad()
def _logits(opened: Opened) -> torch.Tensor:
    """Logits [tokens, vocabulary] in float32 on the first of the general texts."""
    ids = torch.as_tensor(general_tokens(opened.chat, PROBE).example(0)[0], dtype=torch.long, device=opened.model.device)
    opened.model.eval()
    logits: torch.Tensor = opened.model(input_ids=ids[None], use_cache=False).logits[0].float()
    return logits


def _card(source: Path, dtype: str) -> str:
    """The adapter's card with the way to load this folder instead."""
    own = source / CARD
    said = own.read_text(encoding="utf-8") if own.is_file() else "# A fine-tuned model\n\n## How to use it\n"
    head, _, rest = said.partition("## How to use it")
    licence = rest[rest.index("\n## ") :] if "\n## " in rest else ""
    head = head.replace("It needs the base model.", "Here they are merged into it.")
    head = head.replace("library_name: peft", "library_name: transformers").replace("base_model:adapter:", "base_model:finetune:")
    use = f"The adapter is merged into its base; weights are {dtype}.\n\n```python\n{loading_code('full', '')}\n```\n"
    return f"{head}## How to use it\n\n{use}{licence}"
