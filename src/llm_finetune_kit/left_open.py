"""What becomes of a knob that is left open, in words, and a value that it could be given. One row per knob without a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LeftOpen:
    """`means`: what happens where the knob is not set. `example`: a value that it takes."""

    means: str
    example: Any


LEFT_OPEN: dict[str, LeftOpen] = {
    "model.name": LeftOpen("must be given", "gpt2"),
    "model.revision": LeftOpen("the hub's main branch, or what is on this machine already", "main"),
    "model.max_length": LeftOpen("the longest example, at most what the model can read", 512),
    "model.dtype": LeftOpen("bfloat16 where the machine computes it, else float16 on CUDA and float32 elsewhere", "bfloat16"),
    "model.quantization": LeftOpen("none where the weights fit into memory, else nf4 (LoRA only)", "nf4"),
    "model.cache_dir": LeftOpen("the hub's own cache (HF_HOME)", "models"),
    "lora.r": LeftOpen("16, or the usual rank of a known model", 8),
    "lora.alpha": LeftOpen("twice lora.r", 16),
    "lora.target_modules": LeftOpen("all linear layers", ["q_proj", "v_proj"]),
    "lora.modules_to_save": LeftOpen("none", ["embed_tokens", "lm_head"]),
    "lora.plus_ratio": LeftOpen("both matrices learn equally fast", 16.0),
    "data.train_file": LeftOpen("must be given, unless data.mix is", "train.jsonl"),
    "data.eval_file": LeftOpen("a share of the training rows is held out: data.validation_split", "eval.jsonl"),
    "data.mix": LeftOpen("data.train_file is the only set", {"a.jsonl": 2, "b.jsonl": 1}),
    "data.format": LeftOpen("detected from the columns; the run says what and why", "alpaca"),
    "data.columns": LeftOpen("columns are known by their usual names", {"prompt": "frage", "response": "antwort"}),
    "data.template": LeftOpen("the tokenizer's own chat template, else the documented default", "default"),
    "data.streaming": LeftOpen("read whole, but for files too large for that", True),
    "data.max_samples": LeftOpen("all rows", 1000),
    "data.validation_split": LeftOpen("a twentieth: at least 32 rows, at most 512, never more than a fifth", 0.1),
    "data.system_prompt": LeftOpen("none is added", "Answer briefly."),
    "training.learning_rate": LeftOpen("2e-4 (LoRA) or 2e-5 (full) at width 4096, times sqrt(4096 / width)", 2e-4),
    "training.max_steps": LeftOpen("training.num_epochs decides", 100),
    "training.warmup_steps": LeftOpen("training.warmup_ratio decides", 10),
    "training.optimizer": LeftOpen("adamw; in full fine-tuning adamw_8bit where its state would not fit", "adamw_8bit"),
    "training.gradient_checkpointing": LeftOpen("only where activations would not fit", True),
    "training.checkpoint_every": LeftOpen("as few blocks are computed again as memory asks for", 2),
    "training.threads": LeftOpen("the CPU cores that this process may use", 4),
    "training.compile": LeftOpen("only where a GPU would wait for a small model's launches, in long runs", True),
    "training.liger": LeftOpen(
        "on NVIDIA's GPUs from compute capability 8.0 on, where it is installed and blocks are not compiled", True
    ),
    "training.tokens_per_pass": LeftOpen("what the device computes fastest, or as much as fits", 2048),
    "training.save_steps": LeftOpen("ten checkpoints in a run", 100),
    "training.eval_steps": LeftOpen("ten evaluations in a run", 100),
    "training.trackers": LeftOpen("none", "tensorboard"),
    "training.on_disk_full": LeftOpen("pause at a terminal, else stop", "stop"),
    "training.early_stopping_patience": LeftOpen("3 evaluations, where rows are held out", 5),
    "evaluation.generation.top_k": LeftOpen("all tokens", 50),
    "evaluation.prompts": LeftOpen("three held-out questions", ["How do I reset my password?"]),
    "evaluation.metrics": LeftOpen("what suits the held-out answers", ["perplexity", "bleu"]),
    "evaluation.rows": LeftOpen("as many as a few seconds of a usual machine allow", 32),
    "evaluation.sample_steps": LeftOpen("at evaluations, where that costs little", 100),
    "output.run_name": LeftOpen("made of model and data, with a number where it is taken", "first-try"),
}
