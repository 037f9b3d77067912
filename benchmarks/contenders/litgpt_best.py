"""LitGPT at its best on a CPU: weights, adapter and arithmetic in bfloat16, as its published recipes have it; fused AdamW."""

from common import read_job
from litgpt_lora import train


def main() -> None:
    train(read_job(), "bf16-true", fused=True)


if __name__ == "__main__":
    main()
