"""Freeze the inputs of a benchmark run: weights, documents, batches and the first adapter, each written once.

Every contender reads the same files, so no random number and no tokenizer can make a difference between them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from frozen_model import SEED, build_model, build_tokenizer, save_adapter
from llm_finetune_kit.models.facts import model_facts
from shapes import SHAPES, Lengths, counts, lora_settings

IGNORED = -100
POOL_FACTOR = 2  # a packer needs more documents than its steps times those of a step to fill its rows

Document = tuple[list[int], list[int]]
"""Token ids and labels, one as long as the other."""


def alpaca_rows(data: Path) -> list[dict[str, str]]:
    with gzip.open(data / "sft" / "alpaca_data.json.gz", "rt", encoding="utf-8") as file:
        return list(json.load(file))


def dolly_rows(data: Path) -> list[dict[str, str]]:
    """Dolly in Alpaca's words; its longest rows ask about a passage of Wikipedia."""
    with gzip.open(data / "sft" / "databricks-dolly-15k.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"instruction": row["instruction"], "input": row["context"], "output": row["response"]} for row in rows]


SOURCES = {"alpaca": alpaca_rows, "prompted": alpaca_rows, "long": dolly_rows}
# What Alpaca's own trainer puts before its rows (github.com/tatsu-lab/stanford_alpaca, train.py), without and with an input.
BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n",
)


def render(row: dict[str, str], kind: str) -> tuple[str, str]:
    """An Alpaca row as (prompt, answer); rows without an input have no input block."""
    before = BEFORE[bool(row["input"])] if kind == "prompted" else ""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"{before}### Instruction:\n{row['instruction']}\n\n{given}### Response:\n", row["output"]


def encode(tokenizer: Any, row: dict[str, str], kind: str) -> Document:
    """Token ids and labels of one row; the prompt is not trained, the end of text is."""
    prompt, answer = render(row, kind)
    asked = tokenizer.encode(prompt)
    ids = [*asked, *tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return ids, [IGNORED] * len(asked) + ids[len(asked) :]


def usable(documents: Iterator[Document], lengths: Lengths, *, cut: bool) -> Iterator[Document]:
    """Documents within the lengths; longer ones cut, unless the answer lies beyond the cut, or left out."""
    for ids, labels in documents:
        ends = min(len(ids), lengths.most)
        if ends < lengths.least or (ends < len(ids) and not cut) or labels[ends - 1] == IGNORED:
            continue
        yield ids[:ends], labels[:ends]


def sample_documents(data: Path, tokenizer: Any, kind: str, lengths: Lengths, count: int) -> list[Document]:
    """`count` documents of a set in a fixed random order."""
    rows = SOURCES[kind](data)
    random.Random(SEED).shuffle(rows)
    found = usable((encode(tokenizer, row, kind) for row in rows), lengths, cut=kind != "long")
    documents = [document for document, _ in zip(found, range(count), strict=False)]
    if len(documents) < count:
        raise SystemExit(f"the set has only {len(documents)} documents of these lengths, {count} are needed: take fewer steps")
    return documents


def save_documents(documents: list[Document], steps: int, per_step: int, path: Path) -> None:
    """Write ids and labels end to end, their lengths, and which documents make up each step."""
    tensors = {
        "input_ids": torch.tensor([token for ids, _ in documents for token in ids]),
        "labels": torch.tensor([token for _, labels in documents for token in labels]),
        "lengths": torch.tensor([len(ids) for ids, _ in documents]),
        "batches": torch.arange(steps * per_step).view(steps, per_step),
    }
    save_file(tensors, path)


def freeze(data: Path, out: Path, name: str, kind: str, steps: int) -> dict[str, Any]:
    """Write everything under `out` and return what was frozen."""
    shape, lengths = SHAPES[name], SHAPES[name].lengths[kind]
    tokenizer = build_tokenizer(shape, data)
    documents = sample_documents(data, tokenizer, kind, lengths, POOL_FACTOR * lengths.documents_per_step * steps)
    out.mkdir(parents=True, exist_ok=True)
    save_documents(documents, steps, lengths.documents_per_step, out / "documents.safetensors")
    model = build_model(shape, data)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    facts = model_facts(out / "model", name)
    lora = lora_settings(facts)
    save_adapter(model, lora, out / "adapter")
    return {**describe(documents, steps, lengths), "shape": name, "lengths": kind, "lora": lora, **counts(facts)}


def describe(documents: list[Document], steps: int, lengths: Lengths) -> dict[str, Any]:
    """The figures of the data that contenders need and a reader judges it by; lengths are in tokens."""
    size = lengths.documents_per_step
    used = documents[: steps * size]
    found = sorted(len(ids) for ids, _ in used)
    longest = [max(len(ids) for ids, _ in used[i : i + size]) for i in range(0, len(used), size)]
    return {
        "seed": SEED,
        "steps": steps,
        "documents": len(documents),
        "documents_per_step": size,
        "max_length": lengths.most,
        "length_mean": sum(found) / len(found),
        "length_median": found[len(found) // 2],
        "length_max": found[-1],
        "length_of_a_token": sum(length * length for length in found) / sum(found),
        "useful_share_max_length": sum(found) / (len(found) * lengths.most),
        "useful_share_dynamic": sum(found) / (sum(longest) * size),
        "supervised_share": sum(label != IGNORED for _, labels in used for label in labels) / sum(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--lengths", choices=SOURCES, required=True)
    parser.add_argument("--steps", type=int, required=True, help="warm-up and timed steps together")
    args = parser.parse_args()
    description = freeze(args.data, args.out, args.shape, args.lengths, args.steps)
    (args.out / "description.json").write_text(json.dumps(description))


if __name__ == "__main__":
    main()
