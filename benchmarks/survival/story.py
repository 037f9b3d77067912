"""All of a run that has to be the same, bit for bit, however often it was killed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llm_finetune_kit.events import Evaluated, Finished, Sampled, Stepped
from llm_finetune_kit.folder import RunFolder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def story(folder: RunFolder) -> dict[str, Any]:
    """Figures as hexadecimal, files by their hash."""
    told = folder.replay()
    steps = [
        (event.step, event.loss.hex(), event.gradient_norm.hex(), event.learning_rate.hex(), event.tokens)
        for event in told
        if isinstance(event, Stepped)
    ]
    weights = "adapter_model.safetensors" if (folder.final / "adapter_model.safetensors").exists() else "model.safetensors"
    last = folder.checkpoints()[0]
    return {
        "steps": steps,
        "evaluations": [(event.step, event.loss.hex(), event.best) for event in told if isinstance(event, Evaluated)],
        "answers": [(event.step, event.prompt, event.answer) for event in told if isinstance(event, Sampled)],
        "final": digest(folder.final / weights),
        "checkpoint": (last.name, digest(last / weights), digest(last / "optimizer.safetensors")),
        "finished": [(event.step, event.reason) for event in told if isinstance(event, Finished)],
    }
