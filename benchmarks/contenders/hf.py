"""The parts that the Trainer + PEFT contenders with bfloat16 weights share."""

from __future__ import annotations

from typing import Any

import torch
from common import Job
from datasets import Dataset
from peft import PeftModel
from probe import as_rows, run, same_for_all, used_documents
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def train(job: Job, collator: Any, **options: Any) -> None:
    """bfloat16 frozen weights, float32 adapter, bfloat16 autocast (`bf16=True`), no recompute."""
    base = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, job.adapter_dir, is_trainable=True)
    rows = Dataset.from_list(as_rows(used_documents(job)))
    args = TrainingArguments(str(job.out / "trainer"), bf16=True, **(same_for_all(job) | options))
    run(Trainer(model=model, args=args, train_dataset=rows, data_collator=collator), job)
