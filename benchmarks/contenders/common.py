"""What every contender shares: the frozen inputs, the clock, and the result file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

THREADS = 2
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0
IGNORED = -100
PACKAGES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "llm-finetune-kit",
    "unsloth", "unsloth_zoo", "llamafactory", "litgpt", "lightning",
)  # fmt: skip

Adapter = Mapping[str, torch.Tensor]
"""LoRA weights under PEFT's names, as in `adapter_model.safetensors`."""


@dataclass(frozen=True)
class Document:
    """One training example; labels are -100 where nothing is trained and, as usual, not shifted."""

    index: int
    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """How many of its tokens are predicted and scored."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Job:
    """One measured child process: where the inputs lie, how many steps to take, where to write."""

    frozen: Path
    out: Path
    warmup: int
    steps: int
    launched_at: float
    batches_file: Path | None = None
    threads: int = THREADS

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps

    @property
    def model_dir(self) -> Path:
        return self.frozen / "model"

    @property
    def adapter_dir(self) -> Path:
        return self.frozen / "adapter"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What freeze.py says of the inputs: lengths in tokens, documents a step, LoRA settings."""
        return dict(json.loads((self.frozen / "description.json").read_text()))

    @property
    def max_length(self) -> int:
        """Tokens of the longest document there may be."""
        return int(self.facts["max_length"])

    @property
    def documents_per_step(self) -> int:
        return int(self.facts["documents_per_step"])

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.frozen / "documents.safetensors")

    @cached_property
    def pool(self) -> list[Document]:
        """Every frozen document; the batches use the first half, a packer may draw on all."""
        lengths = self._tensors["lengths"].tolist()
        ids = self._tensors["input_ids"].split(lengths)
        labels = self._tensors["labels"].split(lengths)
        return [Document(i, a.tolist(), b.tolist()) for i, (a, b) in enumerate(zip(ids, labels, strict=True))]

    @cached_property
    def batches(self) -> list[list[Document]]:
        """The documents of each step, warm-up included."""
        if self.batches_file is not None:
            indices = json.loads(self.batches_file.read_text())
        else:
            indices = self._tensors["batches"].tolist()
        return [[self.pool[i] for i in step] for step in indices[: self.total_steps]]

    def initial_adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.adapter_dir / "adapter_model.safetensors")


def read_job() -> Job:
    """Read the job from the command line and set the threads; call it before anything is computed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--frozen", type=Path, required=True, help="folder written by freeze.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and adapter.safetensors")
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--launched-at", type=float, default=time.time(), help="when the process was started (epoch)")
    parser.add_argument("--batches-file", type=Path, help="other batches than the frozen ones (reference only)")
    parser.add_argument("--threads", type=int, default=THREADS)
    job = Job(**vars(parser.parse_args()))
    job.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(job.threads)
    return job


class Recorder:
    """Times the steps and keeps what the gate needs.

    Call `step_done` once after each optimizer step. After the last warm-up step the adapter is saved, off the clock.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._losses: list[torch.Tensor | float] = []
        self._documents: list[Callable[[], list[int]]] = []
        self._positions: list[int] = []
        self._seconds: list[float] = []
        self._clock = time.perf_counter()
        self._time_to_first_step = float("nan")
        self._peak_rss_mib = float("nan")

    def step_done(
        self,
        loss: torch.Tensor | float,
        positions: int,
        adapter: Callable[[], Adapter],
        documents: Callable[[], list[int]],
    ) -> None:
        """Record one optimizer step.

        `loss` is the mean per supervised token before the update and `positions` the number of token positions
        computed, padding included. `adapter` is called at the end of the warm-up. `documents`, the indices trained
        on, is called after training, so that working them out costs no measured time.
        """
        self._seconds.append(time.perf_counter() - self._clock)
        self._losses.append(loss)
        self._documents.append(documents)
        self._positions.append(positions)
        done = len(self._losses)
        if done == 1:
            self._time_to_first_step = time.time() - self.job.launched_at
        if done == self.job.warmup:
            save_file({k: v.detach().clone().contiguous() for k, v in adapter().items()}, self._adapter_file)
        if done == self.job.total_steps:
            self._peak_rss_mib = peak_rss_mib()
        self._clock = time.perf_counter()

    @property
    def _adapter_file(self) -> Path:
        return self.job.out / "adapter.safetensors"

    def write(self, **facts: Any) -> None:
        """Write result.json; `facts` is what the contender found out about itself (dtypes, switches)."""
        if len(self._losses) != self.job.total_steps:
            raise RuntimeError(f"{len(self._losses)} steps were recorded, {self.job.total_steps} were asked for")
        documents = [find() for find in self._documents]
        timed = [self.job.pool[i] for step in documents[self.job.warmup :] for i in step]
        result = {
            "seconds": self._seconds[self.job.warmup :],
            "losses": [float(loss) for loss in self._losses],
            "documents": documents,
            "real_tokens": sum(len(document.input_ids) for document in timed),
            "supervised_tokens": sum(document.supervised for document in timed),
            "positions": sum(self._positions[self.job.warmup :]),
            "time_to_first_step": self._time_to_first_step,
            "peak_rss_mib": self._peak_rss_mib,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "facts": facts,
        }
        (self.job.out / "result.json").write_text(json.dumps(result))


def peak_rss_mib() -> float:
    """Highest resident memory of this process so far.

    Read from /proc because `ru_maxrss` also remembers the parent's size before exec. Mapped weight files count.
    """
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
