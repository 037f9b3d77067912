"""Unsloth's CPU trainer as it comes, with 16-bit weights: bfloat16 where the processor has it, recompute on."""

from common import read_job
from unsloth_sft import train


def main() -> None:
    train(read_job(), {})


if __name__ == "__main__":
    main()
