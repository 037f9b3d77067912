"""Putting checkpoints and the final model into the run folder, and removing the ones that are no longer needed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from llm_finetune_kit.events import Listen, Saved
from llm_finetune_kit.folder import MANIFEST, RunFolder, commit, write_whole
from llm_finetune_kit.hardware import versions
from llm_finetune_kit.material import Material
from llm_finetune_kit.models.facts import read_config
from llm_finetune_kit.models.loading import DTYPES
from llm_finetune_kit.models.quantization import quantization_facts
from llm_finetune_kit.report.card import model_card
from llm_finetune_kit.training import checkpoint


def save_checkpoint(folder: RunFolder, material: Material, model: Any, optimizer: Any, progress: Any, say: Listen) -> None:
    started = time.perf_counter()
    target = folder.path / f"checkpoint-{progress.step}"

    def write(draft: Path) -> None:
        checkpoint.save(model, optimizer, progress, draft)
        material.chat.save(draft)

    size = commit(target, write, _facts(material, model, progress.step))
    say(Saved(progress.step, target.name, size, time.perf_counter() - started))
    _rotate(folder, material.plan.config.training.save_total_limit, progress.step, progress.best_step)


def save_final(folder: RunFolder, material: Material, model: Any, step: int, say: Listen) -> None:
    """`final/`: what other tools load. A fully trained model goes back to the dtype its base was stored in."""
    started = time.perf_counter()
    stored = str(getattr(read_config(material.located.folder), "dtype", None) or "float32").removeprefix("torch.")

    def write(draft: Path) -> None:
        checkpoint.save_weights(model, draft, DTYPES.get(stored))
        material.chat.save(draft)
        write_whole(draft / "README.md", model_card(material.plan.config, material.located.name, folder.replay(), step))

    size = commit(folder.final, write, _facts(material, model, step))
    say(Saved(step, folder.final.name, size, time.perf_counter() - started))


def _facts(material: Material, model: Any, step: int) -> dict[str, Any]:
    fingerprints = {name: part["fingerprint"] for name, part in material.report.items() if "fingerprint" in part}
    facts = {"step": step, "base_model": material.located.name, "data_fingerprints": fingerprints, "versions": versions()}
    packed = quantization_facts(model)
    return facts | ({"quantization": packed} if packed else {})


def _rotate(folder: RunFolder, keep: int, step: int, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`, never that of `step` and never the best.

    Checkpoints of later steps were passed over when the run went on: they are damaged and go first.
    """
    folders = folder.checkpoints()
    this = folders.index(folder.path / f"checkpoint-{step}")
    spare = [path for path in folders[this + 1 :] if path.name != f"checkpoint-{best_step}"]
    for path in folders[:this] + spare[::-1][: max(0, len(folders) - this - keep)]:
        (path / MANIFEST).unlink(missing_ok=True)  # a half removed folder must not look whole
        shutil.rmtree(path, ignore_errors=True)
