"""Unsloth at its best on a CPU: no recompute. It turns packing off there, so each batch is padded to its longest row."""

from common import read_job
from unsloth_sft import train


def main() -> None:
    train(read_job(), {"use_gradient_checkpointing": False}, gradient_checkpointing=False)


if __name__ == "__main__":
    main()
