"""Small runs of every kind that there is to lose: a model of random weights, rows, and the knobs of each kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

STEPS = 12
NAMES = ("Lily", "Tom", "Mia", "Ben", "Sue", "Tim")

COMMON = {
    "data.validation_split": "0.2",
    "training.max_steps": str(STEPS),
    "training.save_steps": "3",
    "training.eval_steps": "4",
    "training.learning_rate": "0.003",
    "training.early_stopping_patience": "100",
    "training.tokens_per_pass": "256",
    "evaluation.prompts": '["Who?"]',
    "evaluation.sample_steps": "5",
    "evaluation.generation.max_new_tokens": "4",
    "evaluation.compare": "false",
}
# 40 rows, 32 of them trained: every kind ends in its second epoch or later, some with an incomplete last group
KINDS = {
    "lora": {
        "evaluation.compare": "true",
        "evaluation.rows": "2",
        "training.batch_size": "2",
        "training.gradient_accumulation_steps": "3",
        "lora.dropout": "0.1",
    },
    "full": {"method": "full", "training.batch_size": "4", "training.schedule": "linear"},
    "streamed": {"data.streaming": "true", "training.packing": "false", "lora.dropout": "0.1", "training.batch_size": "3"},
    "quantized": {"model.quantization": "nf4", "training.optimizer": "adamw_8bit", "training.batch_size": "4"},
    "early": {
        "data.validation_split": None,
        "data.eval_file": "other.jsonl",
        "lora.variant": "rslora",
        "training.schedule": "constant",
        "training.save_total_limit": "1",
        "training.batch_size": "4",
        "training.learning_rate": "0.1",
        "training.early_stopping_patience": "2",
        "training.eval_steps": "1",
        "training.save_steps": "2",
    },
    "dora": {
        "lora.variant": "dora",
        "lora.dropout": "0.05",
        "training.batch_size": "8",
        "training.gradient_checkpointing": "true",
    },
}


def make_model(folder: Path, **sizes: int) -> None:
    """A Llama of random weights with the embedded model's tokenizer; without `sizes` of some 300,000 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import llm_finetune_kit

    demo = Path(llm_finetune_kit.__file__).parent / "assets" / "demo"
    known = json.loads((demo / "config.json").read_text())
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    settings = LlamaConfig(
        **(small | sizes),
        num_key_value_heads=2,
        vocab_size=known["vocab_size"],
        max_position_embeddings=256,
        bos_token_id=known["bos_token_id"],
        eos_token_id=known["eos_token_id"],
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    for path in demo.iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, folder)


def make_material(place: Path) -> None:
    """A small model and rows for it."""
    make_model(place / "model")
    rows = [
        {"prompt": f"What did {NAMES[n % 6]} see {'far ' * (n % 5)}away?", "response": f"It was a {'big ' * (n % 7)}cat, {n}."}
        for n in range(40)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = [{"prompt": f"{name}?", "response": "%XQ" * 25} for name in NAMES]
    (place / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))


def command(material: Path, kind: str, outputs: Path) -> list[str]:
    """The words after `finetune` that start a run of a kind, in the folder `outputs/run`."""
    knobs = COMMON | {"training.gradient_accumulation_steps": "1"} | KINDS[kind]
    if knobs.get("data.eval_file"):
        knobs |= {"data.eval_file": str(material / knobs["data.eval_file"])}
    knobs |= {"model.name": str(material / "model"), "data.train_file": str(material / "rows.jsonl")}
    knobs |= {"output.output_dir": str(outputs), "output.run_name": "run"}
    return ["train", *(f"{name}={value}" for name, value in knobs.items() if value is not None)]
