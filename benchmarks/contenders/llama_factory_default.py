"""LLaMA-Factory with the settings of its LoRA example; each batch is padded to its longest row."""

from common import read_job
from datasets import Dataset
from llama_factory_sft import train
from probe import as_rows, used_documents


def main() -> None:
    job = read_job()
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in as_rows(used_documents(job))]
    train(job, Dataset.from_list(rows))


if __name__ == "__main__":
    main()
