"""As unsloth_best, and each layer compiled, by its switch in the environment; it finds no layers to compile in GPT-2."""

import os

from common import read_job
from unsloth_sft import train


def main() -> None:
    os.environ["UNSLOTH_CPU_COMPILE"] = "1"
    train(read_job(), {"use_gradient_checkpointing": False}, gradient_checkpointing=False)


if __name__ == "__main__":
    main()
