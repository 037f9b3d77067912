"""TRL as it comes: float32 weights under bfloat16 autocast, recompute on, each batch padded to its longest row."""

from common import read_job
from probe import used_documents
from trl_sft import train


def main() -> None:
    job = read_job()
    train(job, used_documents(job))


if __name__ == "__main__":
    main()
