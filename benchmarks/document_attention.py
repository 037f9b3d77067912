"""Attention of one document in bfloat16 on a CPU: torch's kernel in float32 against `models.cpu_attention`, one thread.

python benchmarks/document_attention.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from llm_finetune_kit.models.cpu_attention import BlockedAttention

WIDTH = 64
HEADS = {"12 heads": (12, 12), "32 heads that share 4 keys": (32, 4)}


def in_float32(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (part[None].float() for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].bfloat16()


def in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return BlockedAttention.apply(query, key, value, WIDTH**-0.5)


WAYS = {"torch": in_float32, "ours": in_blocks}


def milliseconds(tokens: int, heads: int, kv_heads: int, seconds: float) -> dict[str, float]:
    """Median processor time of forward and backward, the ways taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    end = time.perf_counter() + seconds
    while not all(taken.values()) or time.perf_counter() < end:
        for name in random.sample(list(WAYS), len(WAYS)):
            parts = [torch.randn(count, tokens, WIDTH, dtype=torch.bfloat16) for count in (heads, kv_heads, kv_heads)]
            slope = torch.randn_like(parts[0])
            began = time.process_time()
            WAYS[name](*(part.requires_grad_() for part in parts)).backward(slope)
            taken[name].append(1000 * (time.process_time() - began))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each line")
    parser.add_argument("--tokens", type=int, nargs="+", default=[48, 96, 192, 384, 768, 1024])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for title, (heads, kv_heads) in HEADS.items():
        for tokens in asked.tokens:
            found = milliseconds(tokens, heads, kv_heads, asked.seconds)
            print(f"{title}, {tokens:,} tokens: torch {found['torch']:.2f} ms, ours {found['ours']:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
