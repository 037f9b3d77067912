"""What the loss head takes beyond its two matrix products: HeadLoss and those products alone in random turns, two threads.

python benchmarks/head.py --vocabulary 50257 --hidden 768 --rows 290
"""

# ruff: noqa: E402
from __future__ import annotations

from llm_finetune_kit.hardware import share_the_machine

share_the_machine()

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from llm_finetune_kit.plan.memory import HEAD_WORKSPACE
from llm_finetune_kit.training.step import HeadLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rows", type=int, default=290, help="tokens that are learned")
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(asked.vocabulary, asked.hidden, generator=dice).mul_(0.02).bfloat16()
    states = torch.randn(asked.rows, asked.hidden, generator=dice).bfloat16().requires_grad_()
    labels = torch.randint(asked.vocabulary, (asked.rows,), generator=dice)

    def whole() -> None:
        HeadLoss.apply(states, weight, None, labels, None, torch.bfloat16, 1.0)

    @torch.no_grad()
    def products() -> None:
        for part in states.split(max(1, HEAD_WORKSPACE["cpu"] // (2 * asked.vocabulary))):
            part @ weight.T @ weight

    ways: dict[str, Callable[[], None]] = {"HeadLoss": whole, "its products": products}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.repeats + 1):
        for name in random.sample(list(ways), len(ways)):
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        print(f"{name}: {1000 * statistics.median(taken[1:]):.1f} ms")


if __name__ == "__main__":
    main()
