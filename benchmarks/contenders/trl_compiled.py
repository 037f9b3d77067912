"""As trl_best, and compiled (`torch_compile=True`)."""

from common import read_job
from trl_sft import BEST, train


def main() -> None:
    job = read_job()
    train(job, job.pool, **BEST, torch_compile=True)


if __name__ == "__main__":
    main()
