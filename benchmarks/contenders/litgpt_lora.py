"""The parts that the LitGPT contenders share: the model and the training loop of `litgpt finetune_lora`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from common import IGNORED, LEARNING_RATE, Adapter, Document, Job, Recorder
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.utils import choose_logger, instantiate_torch_optimizer, load_checkpoint
from litgpt_names import from_peft, to_peft
from torch.utils.data import DataLoader

MODEL = "tiny-llama-1.1b"  # the one of its configurations that is a shape of this benchmark


class Probe:
    """Reports each optimizer step of its loop to a Recorder, by hooks of torch and a look at what its loss is given."""

    def __init__(self, job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.recorder = Recorder(job)
        self._model = model
        self._optimizer = optimizer
        self._index = {(tuple(d.input_ids), tuple(d.labels[1:])): d.index for d in job.pool}
        self._ids = self._targets = self._loss = torch.empty(0)
        model.register_forward_pre_hook(self._see_ids)
        optimizer.register_step_post_hook(self._step_done)
        self._compute_loss = lora.chunked_cross_entropy
        lora.chunked_cross_entropy = self._see_loss

    def _see_ids(self, model: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._ids = given[0]

    def _see_loss(self, logits: Any, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        self._targets = targets
        loss = self._compute_loss(logits, targets, **options)
        self._loss = loss.detach()
        return loss

    def _step_done(self, *args: Any) -> None:
        ids, targets = self._ids, self._targets
        self.recorder.step_done(
            self._loss,
            positions=ids.numel(),
            adapter=self._adapter,
            documents=lambda: [self._index[key] for key in documents_of(ids, targets)],
        )

    def _adapter(self) -> Adapter:
        weights = {name: weight.float() for name, weight in self._model.state_dict().items() if "lora_" in name}
        return to_peft(weights, self._model.config.n_layer, self._model.transformer.h[0].attn.qkv.qkv_shapes)

    def facts(self) -> dict[str, Any]:
        """What it really ran with."""
        parameters = list(self._model.parameters())
        return {
            "base_dtype": sorted({str(p.dtype) for p in parameters if not p.requires_grad}),
            "adapter_dtype": sorted({str(p.dtype) for p in parameters if p.requires_grad}),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "recompute": False,
            "flattened": False,
            "attention": "sdpa",
            "optimizer": type(self._optimizer).__name__,
            "fused_optimizer": self._optimizer.param_groups[0]["fused"],
        }


def documents_of(ids: torch.Tensor, targets: torch.Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (ids, labels but the first) of each row: every document ends with a trained token, and padding is none."""
    ends = [int((row != IGNORED).nonzero().max()) + 1 for row in targets]
    rows = zip(ids.tolist(), targets.tolist(), ends, strict=True)
    return [(tuple(a[: end + 1]), tuple(b[:end])) for a, b, end in rows]


def train(job: Job, precision: str, **optimizer_options: Any) -> None:
    """Its `fit` with settings that are everybody's, and those of its own recipe besides."""
    started = time.time()
    folder = converted(job)
    job = replace(job, launched_at=job.launched_at + time.time() - started)
    fabric = lightning.Fabric(devices=1, precision=precision, loggers=choose_logger("csv", job.out, name="lora", log_interval=1))
    model = loaded(fabric, job, folder)
    settings = {"lr": LEARNING_RATE, "weight_decay": 0.0} | optimizer_options
    optimizer = instantiate_torch_optimizer({"class_path": "torch.optim.AdamW", "init_args": settings}, model.parameters())
    probe = Probe(job, model, optimizer)
    size = job.documents_per_step
    lora.fit(
        fabric=fabric,
        model=fabric.setup_module(model),
        optimizer=fabric.setup_optimizers(optimizer),
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        train_dataloader=fabric.setup_dataloaders(batches([d for batch in job.batches for d in batch], size)),
        val_dataloader=fabric.setup_dataloaders(batches(job.batches[0], size)),  # it looks at two batches at most
        devices=1,
        checkpoint_dir=folder,
        out_dir=job.out,
        train=TrainArgs(None, 1, size, size, None, epochs=1, max_steps=job.total_steps, max_seq_length=job.max_length),
        eval=EvalArgs(interval=job.total_steps + 1, max_new_tokens=1),
        data=None,  # for the examples that it generates at evaluations
    )
    probe.recorder.write(**probe.facts(), precision=precision)


def converted(job: Job) -> Path:
    """The frozen model in LitGPT's format, made by its own command where an earlier round has not."""
    done = job.frozen / "litgpt"
    if not done.exists():
        making = job.frozen / "litgpt-unfinished"
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(job.model_dir, making)
        command = [sys.executable, "-m", "litgpt", "convert_to_litgpt", str(making), "--model_name", MODEL]
        subprocess.run(command, check=True)
        (making / "model.safetensors").unlink()
        making.rename(done)
    return done


def loaded(fabric: lightning.Fabric, job: Job, folder: Path) -> torch.nn.Module:
    """The model with LoRA on all linear layers of its blocks, frozen weights and first adapter in place."""
    settings = job.facts["lora"]
    everywhere = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    config = lora.Config.from_file(
        folder / "model_config.yaml", lora_r=settings["r"], lora_alpha=settings["lora_alpha"], lora_dropout=0.0, **everywhere
    )
    with fabric.init_module(empty_init=False):
        model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    load_checkpoint(fabric, model, folder / "lit_model.pth", strict=False)
    model.load_state_dict(from_peft(job.initial_adapter(), config.n_layer), strict=False)
    return model


def batches(documents: list[Document], size: int) -> DataLoader:
    """Batches in order, put together by its own collator, which pads to the longest row."""
    rows = [
        {
            "input_ids": torch.tensor(document.input_ids),
            "labels": torch.tensor(document.labels),
            "token_counts": {"raw": len(document.input_ids), "raw_plus_prompt_template": len(document.input_ids)},
        }
        for document in documents
    ]
    return DataLoader(rows, batch_size=size, collate_fn=get_sft_collate_fn())
