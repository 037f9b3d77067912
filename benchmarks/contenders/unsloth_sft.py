"""The parts that the Unsloth contenders share: its CPU trainer, which takes the place of TRL's `SFTTrainer`."""

# ruff: noqa: I001
from __future__ import annotations

from typing import Any

import unsloth  # first: it changes what the next imports bring

from common import Job
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from probe import as_rows, run, same_for_all, used_documents
from trl import SFTConfig, SFTTrainer


def train(job: Job, lora_options: dict[str, Any], **options: Any) -> None:
    """`FastLanguageModel` and `SFTTrainer` as its notebooks call them, on frozen weights that stay 16-bit.

    Its default, 4-bit weights, would be other training than everybody's.
    """
    lora = LoraConfig.from_pretrained(job.adapter_dir)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(job.model_dir), max_seq_length=job.max_length, load_in_4bit=False
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.0,
        target_modules=sorted(lora.target_modules),
        fan_in_fan_out=lora.fan_in_fan_out,
        **lora_options,
    )
    set_peft_model_state_dict(model, job.initial_adapter())
    args = SFTConfig(str(job.out / "trainer"), max_length=job.max_length, **(same_for_all(job) | options))
    rows = Dataset.from_list(as_rows(used_documents(job)))
    run(SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=args), job)
