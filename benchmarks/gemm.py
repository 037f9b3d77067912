"""Measure the matrix-multiply rate of this machine, the yardstick for how much of it a contender used."""

from __future__ import annotations

import argparse
import json
import time

import torch

THREADS = 2
TOKENS = 512
SECONDS = 1.5


def gflops(dtype: torch.dtype, inner: int, columns: int) -> float:
    """The best rate seen in SECONDS of repeated products [TOKENS, inner] @ [inner, columns]."""
    a, b = torch.randn(TOKENS, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    out = torch.empty(TOKENS, columns, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * TOKENS * inner * columns / best / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int, help="of the layer whose product is measured")
    parser.add_argument("outputs", type=int)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    rates = {kind: gflops(getattr(torch, kind), args.inputs, args.outputs) for kind in ("bfloat16", "float32")}
    print(json.dumps(rates))
