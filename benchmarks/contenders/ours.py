"""llm_finetune_kit on the frozen inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import LEARNING_RATE, MAX_GRAD_NORM, Adapter, Document, Recorder, read_job

StepDone = Callable[[float, int, Callable[[], Adapter]], None]


# ---------------------------------------------------------------- the one place where the engine is wired in
def train(model_dir: Path, adapter_dir: Path, batches: list[list[Document]], step_done: StepDone) -> dict[str, Any]:
    """Train one optimizer step per batch, in order, and call `step_done` right after each.

    - `model_dir`: config.json, model.safetensors (float32) and the tokenizer, as `from_pretrained` reads them.
    - `adapter_dir`: the first LoRA weights in PEFT's layout; A and B are both random and must be loaded.
    - `batches`: the documents of each step, tokenized; `labels` are -100 where nothing is trained, not shifted.
    - optimizer: AdamW, LEARNING_RATE constant, betas (0.9, 0.999), eps 1e-8, weight decay 0, clip MAX_GRAD_NORM.
    - `step_done(loss, positions, adapter)`: the mean loss per supervised token before the update; the token
      positions computed, padding included; and a function that gives the LoRA weights under PEFT's names
      (called once, at the end of the warm-up).

    Returns facts for the report, e.g. {"base_dtype": ["torch.bfloat16"], "adapter_dtype": ["torch.float32"]}.
    """
    raise NotImplementedError("the engine is not wired in yet", LEARNING_RATE, MAX_GRAD_NORM)


# -----------------------------------------------------------------------------------------------------------


def main() -> None:
    job = read_job()
    recorder = Recorder(job)
    remaining = iter(job.batches)

    def step_done(loss: float, positions: int, adapter: Callable[[], Adapter]) -> None:
        indices = [document.index for document in next(remaining)]
        recorder.step_done(loss, positions, adapter, documents=lambda: indices)

    recorder.write(**train(job.model_dir, job.adapter_dir, job.batches, step_done))


if __name__ == "__main__":
    main()
