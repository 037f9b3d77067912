"""The naive recipe: Trainer + PEFT in float32, every row padded to the longest length allowed."""

from common import IGNORED, MAX_LENGTH, Document, read_job
from datasets import Dataset
from peft import PeftModel
from probe import SAME_FOR_ALL, run, used_documents
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def padded(document: Document, pad: int) -> dict[str, list[int]]:
    """A row of MAX_LENGTH positions; padding is masked from attention and from the loss."""
    missing = MAX_LENGTH - len(document.input_ids)
    return {
        "input_ids": document.input_ids + [pad] * missing,
        "attention_mask": [1] * len(document.input_ids) + [0] * missing,
        "labels": document.labels + [IGNORED] * missing,
    }


def main() -> None:
    job = read_job()
    pad = AutoTokenizer.from_pretrained(job.model_dir).eos_token_id
    base = AutoModelForCausalLM.from_pretrained(job.model_dir)
    model = PeftModel.from_pretrained(base, job.adapter_dir, is_trainable=True)
    rows = Dataset.from_list([padded(document, pad) for document in used_documents(job)])
    args = TrainingArguments(str(job.out / "trainer"), max_steps=job.total_steps, **SAME_FOR_ALL)
    run(Trainer(model=model, args=args, train_dataset=rows), job)


if __name__ == "__main__":
    main()
