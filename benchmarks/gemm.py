"""Measure the matrix-multiply rate of this machine, the yardstick for how much of it a contender used."""

from __future__ import annotations

import json
import time

import torch

THREADS = 2
SHAPE = (512, 768, 3072)  # tokens, inputs and outputs of GPT-2's first MLP layer
SECONDS = 1.5


def gflops(dtype: torch.dtype) -> float:
    """The best rate seen in SECONDS of repeated products."""
    rows, inner, columns = SHAPE
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best / 1e9


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(json.dumps({"bfloat16": gflops(torch.bfloat16), "float32": gflops(torch.float32)}))
