"""LitGPT's LoRA recipe as it comes: float32 weights under bfloat16 autocast."""

from common import read_job
from litgpt_lora import train


def main() -> None:
    train(read_job(), "bf16-mixed")


if __name__ == "__main__":
    main()
