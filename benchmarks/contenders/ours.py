"""llm_finetune_kit on the frozen inputs."""

# ruff: noqa: E402
from __future__ import annotations

from llm_finetune_kit.hardware import share_the_machine, start_quickly, this_machine

share_the_machine()
start_quickly()  # both as the commands do, before torch is loaded

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import IGNORED, LEARNING_RATE, MAX_GRAD_NORM, Adapter, Document, Recorder, read_job

from llm_finetune_kit.data.batches import Pass, order
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.prefixes import worth_sharing
from llm_finetune_kit.events import Event, Stepped
from llm_finetune_kit.models.adapters import SETTINGS, add_lora, copy_adapter
from llm_finetune_kit.models.facts import model_facts
from llm_finetune_kit.models.loading import load_base
from llm_finetune_kit.models.locate import Located
from llm_finetune_kit.plan.decisions import best_tokens
from llm_finetune_kit.training.checkpoint import Progress, restore_weights
from llm_finetune_kit.training.loop import Schedule, fit
from llm_finetune_kit.training.optimizer import make_optimizer
from llm_finetune_kit.training.step import Objective

StepDone = Callable[[float, int, Callable[[], Adapter]], None]


class Counting(Objective):
    """Counts the tokens that are computed, of which several documents may have some in common."""

    computed = 0

    def summed(self, work: Pass, scale: float = 1.0) -> torch.Tensor:
        self.computed += work.tokens
        return super().summed(work, scale)


def frozen_objective(model_dir: Path, adapter_dir: Path) -> Counting:
    """The frozen model with its frozen adapter, ready to train."""
    base = load_base(Located(str(model_dir), model_dir), "bfloat16")
    lora = json.loads((adapter_dir / SETTINGS).read_text())
    targets = sorted(lora["target_modules"])
    model = add_lora(base, r=lora["r"], alpha=lora["lora_alpha"], dropout=0.0, targets=targets, base_name="frozen", seed=0)
    restore_weights(model, adapter_dir)
    return Counting(model, torch.bfloat16)


def train(
    model_dir: Path, adapter_dir: Path, batches: list[list[Document]], step_done: StepDone, *, sharing: bool = True
) -> dict[str, Any]:
    """The package's own loop on the documents of each step, in order; `step_done` is called after every step."""
    objective = frozen_objective(model_dir, adapter_dir)
    model = objective.model
    facts = model_facts(model_dir, "frozen")
    tokens_per_pass, _ = best_tokens(this_machine(), facts)
    optimizer = make_optimizer(model.parameters(), weight_decay=0.0)
    schedule = Schedule(
        rates=[LEARNING_RATE] * len(batches),
        examples_per_step=len(batches[0]),
        tokens_per_pass=tokens_per_pass,
        packing=True,
        max_grad_norm=MAX_GRAD_NORM,
        eval_steps=len(batches),
        save_steps=len(batches),
        patience=None,
        seed=0,
        sharing=worth_sharing(facts.block_parameters) if sharing and objective.shares else None,
    )
    held: list[int | None] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stepped):
            held.append(event.memory)
            step_done(event.loss, objective.computed, lambda: copy_adapter(model).tensors)
            objective.computed = 0

    fit(objective, optimizer, in_order(batches), None, schedule, Progress(), lambda _: None, listen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "base_dtype": sorted({str(p.dtype) for p in model.parameters() if not p.requires_grad}),
        "adapter_dtype": sorted({str(p.dtype) for p in trained}),
        "tokens_per_pass": tokens_per_pass,
        "held_bytes": held,
    }


def in_order(batches: list[list[Document]]) -> Tokens:
    """The documents placed so that the loop's shuffled order visits them batch by batch."""
    documents = [document for batch in batches for document in batch]
    place = order(len(documents), seed=0, epoch=0)
    shuffled = [documents[0]] * len(documents)
    for document, index in zip(documents, place, strict=True):
        shuffled[index] = document
    starts = np.concatenate([[0], np.cumsum([len(document.input_ids) for document in shuffled])])
    ids = np.concatenate([np.asarray(document.input_ids, dtype=np.int32) for document in shuffled])
    trained = np.concatenate([np.asarray(document.labels) != IGNORED for document in shuffled])
    return Tokens(ids, trained, starts, np.arange(len(documents), dtype=np.int32))


def measure(*, sharing: bool = True) -> None:
    job = read_job()
    recorder = Recorder(job)
    remaining = iter(job.batches)

    def step_done(loss: float, positions: int, adapter: Callable[[], Adapter]) -> None:
        indices = [document.index for document in next(remaining)]
        recorder.step_done(loss, positions, adapter, documents=lambda: indices)

    recorder.write(**train(job.model_dir, job.adapter_dir, job.batches, step_done, sharing=sharing))


if __name__ == "__main__":
    measure()
