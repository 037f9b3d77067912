"""Put a trained demo model into the package: bfloat16 weights, tokenizer, and a card with measured figures."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llm_finetune_kit.api import generate
from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.evaluation.perplexity import measure

MOST_BYTES = 10_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PROMPTS = ("Tell me a story about a dog.", "What is a good breakfast?", "I want to book a table for two.")

CARD = """\
---
license: cc-by-sa-4.0
language: en
pipeline_tag: text-generation
library_name: transformers
---
# The embedded demo model

A Llama-shaped language model of {parameters:,} weights, small enough to live inside the package. It writes
readable English, knows very little, and is there so that a first fine-tuning run needs no network and no GPU.
**Do not rely on anything it says.**

Trained from random weights by LLM Finetune Kit itself (`scripts/demo_model/`): {steps} steps of full fine-tuning
on all tokens, then {second_steps} steps on answers only.

| | |
|---|---|
| shape | {layers} layers, width {hidden}, {heads} heads, vocabulary {vocabulary:,}, context {positions} tokens |
| training tokens | {tokens:,} seen |
| bits per byte on {rows} held-out Dolly answers | {bits:.3f} |
| perplexity per token on them | {perplexity:.2f} |
| size | {size:,} bytes with tokenizer |

## Data and licence

Trained on databricks-dolly-15k (CC BY-SA 3.0, Databricks), Schema-Guided Dialogue (CC BY-SA 4.0, Google),
GSM8K (MIT, OpenAI) and a sample of TinyStories (CDLA-Sharing-1.0). The weights are shared under CC BY-SA 4.0.
No row of the held-out file, nor its answer, occurs in the training files (`prepare.py` removes them).

## What it says

Greedy answers, not chosen:

{samples}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/demo_model"), help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, default=Path("src/llm_finetune_kit/assets/demo"))
    asked = parser.parse_args()
    runs = asked.build / "runs"
    shutil.rmtree(asked.out, ignore_errors=True)
    asked.out.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(runs / "finetune" / "final", dtype=torch.bfloat16)
    model.save_pretrained(asked.out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(asked.build / "init" / name, asked.out / name)
    card = CARD.format(**figures(asked.out, asked.build, model))
    (asked.out / "README.md").write_text(card, encoding="utf-8")
    size = total_bytes(asked.out)
    if size > MOST_BYTES:
        raise SystemExit(f"{size:,} bytes are more than {MOST_BYTES:,}")
    print(card)


def figures(folder: Path, build: Path, model: Any) -> dict[str, Any]:
    """Everything that the card says, measured on the packaged files."""
    held_out = measure(str(folder), str(build / "heldout_dolly.jsonl"))["model"]
    summaries = [finished(build / "runs" / name) for name in ("pretrain", "finetune")]
    config = model.config
    how = GenerationSection(max_new_tokens=80)
    samples = [quoted(f"**{prompt}**\n\n{generate(str(folder), prompt, how=how)}") for prompt in PROMPTS]
    return {
        "parameters": model.num_parameters(),
        "steps": summaries[0]["final_step"],
        "second_steps": summaries[1]["final_step"],
        "tokens": sum(summary["tokens"] for summary in summaries),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "rows": held_out["rows"],
        "bits": held_out["bits_per_byte"],
        "perplexity": held_out["perplexity"],
        "size": total_bytes(folder),
        "samples": "\n\n".join(samples),
    }


def quoted(text: str) -> str:
    """The text as a Markdown quotation."""
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def finished(run: Path) -> dict[str, Any]:
    """The summary of a run's Finished event."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").split("\n")
    events = [json.loads(line) for line in lines if line]
    return next(event["summary"] for event in reversed(events) if event["event"] == "Finished")


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
