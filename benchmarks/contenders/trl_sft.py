"""The parts that the TRL contenders share."""

from __future__ import annotations

from typing import Any

from common import Document, Job
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from probe import SAME_FOR_ALL, as_rows, run
from trl import SFTConfig, SFTTrainer


def train(job: Job, documents: list[Document], **options: Any) -> None:
    """SFTTrainer as its quickstart calls it: model by path, `peft_config`, tokenized rows with labels."""
    lora = LoraConfig.from_pretrained(job.adapter_dir)
    lora.inference_mode = False  # saved as True, which would leave nothing to train
    args = SFTConfig(str(job.out / "trainer"), max_steps=job.total_steps, **(SAME_FOR_ALL | options))
    trainer = SFTTrainer(
        model=str(job.model_dir),
        args=args,
        train_dataset=Dataset.from_list(as_rows(documents)),
        peft_config=lora,
    )
    set_peft_model_state_dict(trainer.model, job.initial_adapter())
    run(trainer, job)


BEST: dict[str, Any] = {
    "model_init_kwargs": {"dtype": "bfloat16"},
    "gradient_checkpointing": False,
    # rows of 512 tokens, one a step: the tokens of about five documents where the others train four
    "packing": True,
    "max_length": 512,
    "per_device_train_batch_size": 1,
    # rows come out longest document first; TRL's default order mixes them
    "train_sampling_strategy": "random",
}
