"""The parts that the TRL contenders share."""

from __future__ import annotations

from typing import Any

from common import Document, Job
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from probe import as_rows, run, same_for_all
from trl import SFTConfig, SFTTrainer


def train(job: Job, documents: list[Document], **options: Any) -> None:
    """SFTTrainer as its quickstart calls it: model by path, `peft_config`, tokenized rows with labels."""
    lora = LoraConfig.from_pretrained(job.adapter_dir)
    lora.inference_mode = False  # saved as True, which would leave nothing to train
    args = SFTConfig(str(job.out / "trainer"), **(same_for_all(job) | options))
    trainer = SFTTrainer(
        model=str(job.model_dir),
        args=args,
        train_dataset=Dataset.from_list(as_rows(documents)),
        peft_config=lora,
    )
    set_peft_model_state_dict(trainer.model, job.initial_adapter())
    run(trainer, job)


def best(job: Job) -> dict[str, Any]:
    """The fast options, with rows just long enough that no document is cut, one a step."""
    return {
        "model_init_kwargs": {"dtype": "bfloat16"},
        "gradient_checkpointing": False,
        "packing": True,
        "max_length": job.max_length,
        "per_device_train_batch_size": 1,
        # rows come out longest document first; TRL's default order mixes them
        "train_sampling_strategy": "random",
    }
