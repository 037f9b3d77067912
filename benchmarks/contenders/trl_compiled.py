"""As trl_best, and compiled (`torch_compile=True`)."""

from common import read_job
from trl_sft import best, train


def main() -> None:
    job = read_job()
    train(job, job.pool, **best(job), torch_compile=True)


if __name__ == "__main__":
    main()
