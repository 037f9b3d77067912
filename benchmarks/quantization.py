"""What quantization costs: perplexity of really trained models in full and packed, and memory and time of a larger one.

    python benchmarks/quantization.py accuracy TEXT MODEL [MODEL ...]
    python benchmarks/quantization.py memory MODEL

TEXT holds one document a line, or documents between `<|endoftext|>` lines. The tables are Markdown.
"""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS: list[tuple[str | None, bool]] = [
    (None, False),
    ("nf4", False),
    ("nf4", True),
    ("fp4", False),
    ("fp4", True),
    ("int8", False),
]
DOCUMENTS = 200
LENGTH = 256  # tokens of a document that are used


def documents(path: Path) -> list[str]:
    """Whole documents of a text file, gzip or not; the last one may be cut off and is left out."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="ignore")
    parts = text.split("<|endoftext|>") if "<|endoftext|>" in text else text.split("\n")
    return [part.strip() for part in parts[:-1] if len(part.strip()) > 100]


def accuracy(text: Path, names: list[str]) -> None:
    """Perplexity per token, and its change against the same dtype in full, for every way of packing."""
    from llm_finetune_kit.data.batches import evaluation_passes
    from llm_finetune_kit.data.masks import Tokens
    from llm_finetune_kit.models.loading import DTYPES, load_base
    from llm_finetune_kit.models.locate import locate
    from llm_finetune_kit.models.tokenizer import load_tokenizer
    from llm_finetune_kit.training.step import Objective, mean_loss

    texts = documents(text)[:DOCUMENTS]
    print("| model | dtype | weights | targets | loss, nats/token | perplexity | change |\n|---|---|---|---|---|---|---|")
    for name in names:
        located = locate(name)
        chat = load_tokenizer(located.folder)
        coded = [chat.with_bos(chat.backend.encode(one, add_special_tokens=False).ids)[:LENGTH] for one in texts]
        starts = np.cumsum([0, *(len(ids) for ids in coded)])
        ids = np.concatenate(coded).astype(np.int32)
        tokens = Tokens(ids, np.ones(len(ids), dtype=bool), starts, np.arange(len(coded), dtype=np.int32))
        for dtype in ("float32", "bfloat16"):
            full = 0.0
            for kind, double in WAYS:
                model = load_base(located, dtype, quantization=kind, double_quantization=double)
                loss, targets = mean_loss(Objective(model, DTYPES[dtype]), evaluation_passes(tokens, 2048))
                full = full or loss
                label = f"{kind}, double" if double else kind or "full"
                change = f"{100 * math.expm1(loss - full):+.2f} %" if kind else ""
                print(
                    f"| {Path(name).name} | {dtype} | {label} | {targets} | {loss:.4f} | {math.exp(loss):.3f} | {change} |",
                    flush=True,
                )


CHILD = """
import json, sys, time
import torch, transformers, peft, bitsandbytes
from llm_finetune_kit.hardware import release_memory
from llm_finetune_kit.models.loading import load_base
from llm_finetune_kit.models.locate import locate
def status():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmHWM", "RssAnon")}
name, kind, double = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "True"
located = locate(name)
before = status()
began = time.perf_counter()
model = load_base(located, "bfloat16", quantization=kind, double_quantization=double)
seconds = time.perf_counter() - began
release_memory()
loaded = status()
size = sum(part.numel() * part.element_size() for part in model.parameters()) / 2**20
ids = torch.arange(3, 67)[None]
with torch.no_grad():
    model(input_ids=ids, use_cache=False)
    began = time.perf_counter()
    model(input_ids=ids, use_cache=False)
print(json.dumps({"peak": loaded["VmHWM"] - before["RssAnon"], "held": loaded["RssAnon"] - before["RssAnon"], "seconds": seconds,
                  "size": size, "forward": time.perf_counter() - began}))
"""


def memory(name: str) -> None:
    """Load a model in every way, each in a process of its own: memory over that of the libraries, and time."""
    print("| kept as | weights, MiB | held, MiB | peak of loading, MiB | loading, s | 64 tokens, s |\n|---|---|---|---|---|---|")
    for kind, double in WAYS:
        done = subprocess.run([sys.executable, "-c", CHILD, name, kind or "", str(double)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        label = f"{kind}, double" if double else kind or "full"
        numbers = [f"{found[key]:.0f}" for key in ("size", "held", "peak")] + [
            f"{found['seconds']:.1f}",
            f"{found['forward']:.2f}",
        ]
        print(f"| {label} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    began = time.perf_counter()
    if sys.argv[1:2] == ["accuracy"] and len(sys.argv) > 3:
        accuracy(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1:2] == ["memory"] and len(sys.argv) == 3:
        memory(sys.argv[2])
    else:
        raise SystemExit(__doc__)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
