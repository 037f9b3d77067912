"""TRL at its best on a CPU: bfloat16 weights, documents packed, no recompute."""

from common import read_job
from trl_sft import best, train


def main() -> None:
    job = read_job()
    train(job, job.pool, **best(job))


if __name__ == "__main__":
    main()
