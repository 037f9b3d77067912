"""How a transformers `Trainer` (or one of its children) is measured: two hooks, no change to what it does."""

from __future__ import annotations

from typing import Any

import torch
from common import IGNORED, LEARNING_RATE, MAX_GRAD_NORM, Document, Job, Recorder
from peft import get_peft_model_state_dict
from transformers import Trainer, TrainerCallback


def same_for_all(job: Job) -> dict[str, Any]:
    """The trainer's settings that no contender chooses for itself."""
    return {
        "max_steps": job.total_steps,
        "per_device_train_batch_size": job.documents_per_step,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",  # keeps the frozen batches
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
    }


class StepProbe(TrainerCallback):
    """Reports each optimizer step of a trainer to a Recorder."""

    def __init__(self, trainer: Trainer, job: Job) -> None:
        self.recorder = Recorder(job)
        self.batch: dict[str, Any] = {}
        self._loss = torch.tensor(float("nan"))
        self.trainer = trainer
        self._index = {(tuple(d.input_ids), tuple(d.labels)): d.index for d in job.pool}
        self._watch(trainer)
        trainer.add_callback(self)

    def _watch(self, trainer: Trainer) -> None:
        """Keep the batch and the loss of the step under way."""
        training_step = trainer.training_step

        def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            self.batch = dict(inputs)
            self._loss = training_step(model, inputs, *args, **kwargs)
            return self._loss

        trainer.training_step = watched

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        batch = self.batch
        self.recorder.step_done(
            self._loss,
            positions=batch["input_ids"].numel(),
            adapter=lambda: get_peft_model_state_dict(self.trainer.model),
            documents=lambda: [self._index[key] for key in documents_of(batch)],
        )


def documents_of(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (ids, labels) of each document in a padded or flattened batch, as the model was given them."""
    ids, labels = batch["input_ids"], batch["labels"]
    if is_padded(batch):
        rows = enumerate(batch["attention_mask"].bool())
        pieces = [(ids[i, kept], labels[i, kept]) for i, kept in rows]
    else:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        spans = zip(starts, [*starts[1:], ids.shape[1]], strict=True)
        # positions that fill up the row begin at 0 too, and are not trained
        pieces = [(ids[0, start:end], labels[0, start:end]) for start, end in spans if (labels[0, start:end] != IGNORED).any()]
    return [(tuple(a.tolist()), tuple(b.tolist())) for a, b in pieces]


def is_padded(batch: dict[str, Any]) -> bool:
    """Whether each document has a row of its own; a packed row has no mask, or one of positions by positions."""
    return "attention_mask" in batch and batch["attention_mask"].dim() == 2


def run(trainer: Trainer, job: Job) -> None:
    """Train under the probe and write the result, with the dtypes and switches really in force."""
    probe = StepProbe(trainer, job)
    trainer.train()
    probe.recorder.write(**facts(trainer, probe.batch))


def facts(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """What the trainer really ran with, read off the trained objects and not off the request."""
    model, args = trainer.model, trainer.args
    return {
        "base_dtype": sorted({str(p.dtype) for p in model.parameters() if not p.requires_grad}),
        "adapter_dtype": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "recompute": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "flattened": not is_padded(batch),
        "packing": getattr(args, "packing", False),
        "compiled": args.torch_compile or any(module._compiled_call_impl is not None for module in model.modules()),
        "attention": model.config._attn_implementation,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "fused_optimizer": trainer.optimizer.param_groups[0].get("fused"),
        "logging_steps": args.logging_steps,
    }


def as_rows(documents: list[Document]) -> list[dict[str, list[int]]]:
    """Tokenized rows as `datasets` and the trainers take them."""
    return [{"input_ids": document.input_ids, "labels": document.labels} for document in documents]


def used_documents(job: Job) -> list[Document]:
    """The documents of all batches, in training order."""
    return [document for batch in job.batches for document in batch]
