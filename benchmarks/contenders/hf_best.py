"""Trainer + PEFT at its best on a CPU: bfloat16 and no padding at all (`DataCollatorWithFlattening`)."""

from common import read_job
from hf import train
from transformers import DataCollatorWithFlattening


def main() -> None:
    train(read_job(), DataCollatorWithFlattening())


if __name__ == "__main__":
    main()
