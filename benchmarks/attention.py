"""Attention over a packed row on this machine: one document at a time against a dense block-diagonal mask.

Forward and backward of one attention layer, alternating in one run; prints the median milliseconds of both and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from llm_finetune_kit.models.attention import Documents, per_document_attention

CASES = {"21 short": [97] * 21, "8 middling": [256] * 8, "2 long": [1024] * 2, "1 long": [2048]}


def dense(parts: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """What transformers does for packed rows: one boolean mask over the whole row."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None]).tril()
    return scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)


def per_document(parts: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    return per_document_attention(torch.nn.Module(), *parts, None, documents=Documents(tuple(lengths), parts[0].device))[0]


def milliseconds(attend: object, parts: list[torch.Tensor], lengths: list[int]) -> float:
    started = time.perf_counter()
    attend(parts, lengths).float().sum().backward()  # type: ignore[operator]
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print("| documents | number format | dense mask, ms | per document, ms | ratio |\n|---|---|---|---|---|")
    for name, lengths in CASES.items():
        for dtype in (torch.bfloat16, torch.float32):
            parts = [torch.randn(1, 12, sum(lengths), 64, dtype=dtype, requires_grad=True) for _ in range(3)]
            torch.testing.assert_close(dense(parts, lengths), per_document(parts, lengths), rtol=2e-2, atol=2e-2)
            times = [(milliseconds(dense, parts, lengths), milliseconds(per_document, parts, lengths)) for _ in range(rounds)]
            a, b = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {a:.0f} | {b:.0f} | {a / b:.1f} |", flush=True)


if __name__ == "__main__":
    main()
