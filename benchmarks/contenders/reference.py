"""The yardstick of the equality gate: plain transformers + PEFT in float32, one document at a time.

Without padding, packing, masks or a trainer there is nothing left to get wrong. Its speed is never reported.
"""

from __future__ import annotations

from functools import partial

import torch
from common import IGNORED, LEARNING_RATE, MAX_GRAD_NORM, Document, Recorder, read_job
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM


def document_loss(model: PeftModel, document: Document) -> torch.Tensor:
    """Summed cross-entropy of the supervised tokens."""
    logits = model(input_ids=torch.tensor([document.input_ids]), use_cache=False).logits[0]
    targets = torch.tensor(document.labels[1:])
    return torch.nn.functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORED, reduction="sum")


def main() -> None:
    job = read_job()
    base = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job.adapter_dir, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    recorder = Recorder(job)
    for batch in job.batches:
        targets = sum(document.supervised for document in batch)
        loss = 0.0
        for document in batch:
            part = document_loss(model, document) / targets
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        indices = [document.index for document in batch]
        recorder.step_done(
            loss,
            positions=sum(len(document.input_ids) for document in batch),
            adapter=lambda: get_peft_model_state_dict(model),
            documents=partial(list, indices),
        )
    recorder.write()


if __name__ == "__main__":
    main()
