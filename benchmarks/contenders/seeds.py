"""The naive recipe: Trainer + PEFT in float32, every row padded to the longest length allowed."""

import torch
from common import IGNORED, Document, read_job
from datasets import Dataset
from peft import PeftModel
from probe import run, same_for_all, used_documents
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def padded(document: Document, length: int, pad: int) -> dict[str, list[int]]:
    """A row of `length` positions; padding is masked from attention and from the loss."""
    missing = length - len(document.input_ids)
    return {
        "input_ids": document.input_ids + [pad] * missing,
        "attention_mask": [1] * len(document.input_ids) + [0] * missing,
        "labels": document.labels + [IGNORED] * missing,
    }


def main() -> None:
    job = read_job()
    pad = AutoTokenizer.from_pretrained(job.model_dir).pad_token_id
    base = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job.adapter_dir, is_trainable=True)
    rows = Dataset.from_list([padded(document, job.max_length, pad) for document in used_documents(job)])
    args = TrainingArguments(str(job.out / "trainer"), **same_for_all(job))
    run(Trainer(model=model, args=args, train_dataset=rows), job)


if __name__ == "__main__":
    main()
