"""Freeze the inputs of a benchmark run: weights, documents, batches and the first adapter, each written once.

Every contender reads the same files, so no random number and no tokenizer can make a difference between them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

MAX_LENGTH = 512
IGNORED = -100
DOCUMENTS_PER_STEP = 4
SEED = 20260101
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["c_attn", "c_proj", "c_fc"],
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
}
LORA_B_STD = 0.02  # B = 0, the usual start, would hide a contender that gets A wrong
POOL_FACTOR = 2  # a packer needs more documents than 4 a step to fill its rows


def render(row: dict[str, str]) -> tuple[str, str]:
    """An Alpaca row as (prompt, answer); rows without an input have no input block."""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n", row["output"]


def encode(tokenizer: GPT2Tokenizer, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, cut at MAX_LENGTH; the prompt is not trained, the end of text is."""
    prompt, answer = (tokenizer.encode(part) for part in render(row))
    ids = prompt + answer + [tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return ids[:MAX_LENGTH], labels[:MAX_LENGTH]


def sample_documents(data: Path, tokenizer: GPT2Tokenizer, count: int) -> list[tuple[list[int], list[int]]]:
    """`count` documents of Alpaca in a fixed random order, leaving out those whose answer lies beyond the cut."""
    with gzip.open(data / "sft" / "alpaca_data.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    random.Random(SEED).shuffle(rows)
    documents = []
    for row in rows:
        ids, labels = encode(tokenizer, row)
        if labels[-1] != IGNORED:
            documents.append((ids, labels))
        if len(documents) == count:
            return documents
    raise SystemExit(f"{data} has only {len(documents)} usable rows, {count} are needed")


def save_documents(documents: list[tuple[list[int], list[int]]], steps: int, path: Path) -> None:
    """Write ids and labels end to end, their lengths, and which documents make up each step."""
    batches = torch.arange(steps * DOCUMENTS_PER_STEP).view(steps, DOCUMENTS_PER_STEP)
    tensors = {
        "input_ids": torch.tensor([token for ids, _ in documents for token in ids]),
        "labels": torch.tensor([token for _, labels in documents for token in labels]),
        "lengths": torch.tensor([len(ids) for ids, _ in documents]),
        "batches": batches,
    }
    save_file(tensors, path)


def build_model(data: Path) -> GPT2LMHeadModel:
    """A GPT-2 of the published shape with random weights and no dropout anywhere."""
    stored = json.loads((data / "configs" / "gpt2.config.json").read_text())
    known = GPT2Config().to_dict()
    kept = {key: value for key, value in stored.items() if key in known}
    config = GPT2Config(**{**kept, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(config)


def save_adapter(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write the first adapter in PEFT's layout, with a small random A and a small random B."""
    torch.manual_seed(SEED + 1)
    wrapped: Any = get_peft_model(model, LoraConfig(**LORA))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=LORA_B_STD)
    wrapped.save_pretrained(folder)


def freeze(data: Path, out: Path, steps: int) -> dict[str, Any]:
    """Write everything under `out` and return what was frozen."""
    vocabulary = data / "tokenizers" / "gpt2"
    tokenizer = GPT2Tokenizer(vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"))
    documents = sample_documents(data, tokenizer, POOL_FACTOR * DOCUMENTS_PER_STEP * steps)
    out.mkdir(parents=True, exist_ok=True)
    save_documents(documents, steps, out / "documents.safetensors")
    model = build_model(data)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    save_adapter(model, out / "adapter")
    return describe(documents, steps)


def describe(documents: list[tuple[list[int], list[int]]], steps: int) -> dict[str, Any]:
    """The figures a reader needs to judge the data."""
    used = documents[: steps * DOCUMENTS_PER_STEP]
    lengths = sorted(len(ids) for ids, _ in used)
    longest = [max(len(ids) for ids, _ in used[i : i + DOCUMENTS_PER_STEP]) for i in range(0, len(used), DOCUMENTS_PER_STEP)]
    return {
        "seed": SEED,
        "steps": steps,
        "documents": len(documents),
        "documents_per_step": DOCUMENTS_PER_STEP,
        "max_length": MAX_LENGTH,
        "length_mean": sum(lengths) / len(lengths),
        "length_median": lengths[len(lengths) // 2],
        "length_max": lengths[-1],
        "useful_share_max_length": sum(lengths) / (len(lengths) * MAX_LENGTH),
        "useful_share_dynamic": sum(lengths) / (sum(longest) * DOCUMENTS_PER_STEP),
        "supervised_share": sum(label != IGNORED for _, labels in used for label in labels) / sum(lengths),
        "lora": LORA,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="warm-up and timed steps together")
    args = parser.parse_args()
    description = freeze(args.data, args.out, args.steps)
    (args.out / "description.json").write_text(json.dumps(description))


if __name__ == "__main__":
    main()
