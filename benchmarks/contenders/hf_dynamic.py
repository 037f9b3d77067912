"""Trainer + PEFT in bfloat16, each batch padded to its longest row: the usual careful recipe."""

from common import read_job
from hf import train
from transformers import AutoTokenizer, DataCollatorForSeq2Seq


def main() -> None:
    job = read_job()
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    train(job, DataCollatorForSeq2Seq(tokenizer))


if __name__ == "__main__":
    main()
