"""The parts that the LLaMA-Factory contenders share: its own `run_exp`, on token ids that it loads from disk."""

# ruff: noqa: E402
from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from common import Job
from datasets import Dataset
from probe import StepProbe, facts, same_for_all

# Imported for sound files alone, and its published build does not load beside a CPU build of torch. It must stand
# in after transformers, which asks whether it is installed.
sys.modules["torchaudio"] = ModuleType("torchaudio")

from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp


def train(job: Job, rows: Dataset, **options: Any) -> None:
    """`llamafactory-cli train` with the settings of its LoRA example: bfloat16 weights and autocast, recompute on."""
    tokenized = job.out / "tokenized"
    rows.save_to_disk(tokenized)
    shared = same_for_all(job)
    del shared["train_sampling_strategy"]  # its own option is disable_shuffling
    settings = {
        "model_name_or_path": str(job.model_dir),
        "adapter_name_or_path": str(job.adapter_dir),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "frozen",  # must be named, is not read: `tokenized_path` goes first
        "tokenized_path": str(tokenized),
        "disable_shuffling": True,
        "template": "alpaca",
        "cutoff_len": job.max_length,
        "output_dir": str(job.out / "trainer"),
        "bf16": True,
        "logging_steps": 10,
    }
    probes: list[StepProbe] = []

    class Probed(workflow.CustomSeq2SeqTrainer):  # type: ignore[misc]
        """Its trainer, with the probe put on it once it is built."""

        def __init__(self, **parts: Any) -> None:
            super().__init__(**parts)
            probes.append(StepProbe(self, job))

    workflow.CustomSeq2SeqTrainer = Probed
    run_exp(settings | shared | options)
    probe = probes[0]
    probe.recorder.write(**facts(probe.trainer, probe.batch) | {"packing": "neat_packing" in options})
