"""How far the plan's memory is off, predicted and measured, over models, methods, lengths and batches; plan_times.py has times.

    python benchmarks/plan_accuracy.py run --out results.jsonl          (goes on where it stopped)
    python benchmarks/plan_accuracy.py table --out results.jsonl

Every case is one whole run (`run()`: load, evaluate, answer, train, save, report) in a fresh process, on random weights of
a real model's shape with random tokens in rows of exact lengths. Memory is VmHWM, read and reset at every event, so
that the table can say in which phase the peak was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 2048,
    },  # 1,024 in the real one: longer rows are wanted here
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "llama-1b-4-layers": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
HELD_OUT = 2  # rows
WARM_UP = 2  # steps of a run that its speed is not taken from


@dataclass(frozen=True)
class Case:
    """One run. `shortest` below `length` draws row lengths evenly between the two; recompute 0 is none, 1 all blocks."""

    model: str
    method: str  # full, lora, nf4
    length: int
    batch: int
    recompute: int = 0
    shortest: int = 0
    steps: int = 3
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        rows = f"{self.shortest}-{self.length}" if self.shortest else f"{self.length}"
        tail = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"{self.model} {self.method} {rows}x{self.batch} recompute {self.recompute}{tail}"


CASES = [
    Case("smollm2-135m", "lora", 128, 8),
    Case("smollm2-135m", "lora", 512, 2),
    Case("smollm2-135m", "lora", 2048, 1),
    Case("smollm2-135m", "lora", 2048, 1, 1),
    Case("smollm2-135m", "lora", 1024, 1, 2),
    Case("smollm2-135m", "lora", 512, 8, shortest=32, steps=12),
    Case("smollm2-135m", "lora", 512, 1, dtype="float32"),
    Case("smollm2-135m", "full", 256, 4),
    Case("smollm2-135m", "full", 512, 4, shortest=64, steps=12),
    Case("smollm2-135m", "nf4", 512, 2),
    Case("smollm2-135m", "nf4", 1024, 1, 1),
    Case("llama-1b-4-layers", "lora", 512, 2),
    Case("llama-1b-4-layers", "lora", 2048, 1),
    Case("llama-1b-4-layers", "lora", 1024, 1, 1),
    Case("llama-1b-4-layers", "full", 256, 2),
    Case("llama-1b-4-layers", "full", 512, 1, 1),
    Case("llama-1b-4-layers", "nf4", 512, 2),
    Case("llama-1b-4-layers", "nf4", 2048, 1),
    Case("qwen2.5-0.5b", "lora", 256, 2),
    Case("qwen2.5-0.5b", "lora", 1024, 1),
    Case("qwen2.5-0.5b", "lora", 2048, 1, 1),
    Case("qwen2.5-0.5b", "full", 256, 1),
    Case("qwen2.5-0.5b", "nf4", 512, 1),
    Case("gpt2", "lora", 128, 8),
    Case("gpt2", "lora", 512, 2),
    Case("gpt2", "lora", 1024, 1, 1),
    Case("gpt2", "lora", 512, 4, shortest=32, steps=12),
    Case("gpt2", "full", 256, 4),
    Case("gpt2", "full", 512, 2, 1),
    Case("tinyllama", "lora", 256, 2),
    Case("tinyllama", "nf4", 256, 2),
    Case("tinyllama", "lora", 1024, 1, 1),
]


# --- inputs ------------------------------------------------------------------------------------------------


def write_model(name: str, folder: Path) -> None:
    """Random bfloat16 weights of a real shape, and a tokenizer whose vocabulary has the real size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(int(config.vocab_size), folder)


def write_tokenizer(size: int, folder: Path) -> None:
    """A byte-level BPE of `size` pieces, each put together from two earlier ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    pieces = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known, merges = set(pieces), []
    while len(pieces) < size:
        left, right = (draw.choice(pieces[1:2000]) for _ in range(2))
        if left + right not in known and len(left + right) < 12:
            known.add(left + right)
            pieces.append(left + right)
            merges.append((left, right))
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)


def write_rows(case: Case, vocabulary: int, folder: Path) -> tuple[str, str]:
    """Rows of random tokens, all of them learned: training and held-out files."""
    draw = random.Random(1)
    names = []
    for name, count in (("train", case.batch * case.steps), ("held_out", HELD_OUT)):
        path = folder / f"{name}.jsonl"
        with path.open("w") as file:
            for index in range(count):
                length = case.length if index == 0 or not case.shortest else draw.randint(case.shortest, case.length)
                ids = [draw.randrange(1, vocabulary) for _ in range(length - 1)] + [0]
                file.write(json.dumps({"input_ids": ids}) + "\n")
        names.append(str(path))
    return names[0], names[1]


# --- one run -----------------------------------------------------------------------------------------------


def values(case: Case, model: Path, rows: tuple[str, str], out: Path) -> dict[str, Any]:
    """The config of a case, by dotted names."""
    return {
        "model.name": str(model),
        "model.dtype": case.dtype,
        "model.quantization": case.method if case.method == "nf4" else None,
        "method": "full" if case.method == "full" else "lora",
        "data.train_file": rows[0],
        "data.eval_file": rows[1],
        "data.loss_on": "all",
        "training.batch_size": case.batch,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": case.steps,
        "training.eval_steps": case.steps,
        "training.save_steps": case.steps,
        "training.gradient_checkpointing": case.recompute > 0,
        "training.checkpoint_every": case.recompute or None,
        "training.threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or None,
        "evaluation.generation.max_new_tokens": 4,
        "output.output_dir": str(out),
    }


class Phases:
    """Peak resident bytes between events, by the name of the phase that the earlier event opened."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.steps: list[tuple[int, float]] = []
        self.phase = "import"

    def close(self, name: str) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak)
        self.phase = name
        Path("/proc/self/clear_refs").write_text("5")

    def hear(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "Stepped":
            self.steps.append((event.tokens, event.seconds))
        names = {
            "Stage": getattr(event, "name", ""),
            "Stepped": "after a step",
            "Evaluated": "after an evaluation",
            "Saved": "after a save",
        }
        if kind in names:
            self.close(names[kind])


def child(case: Case, model: Path) -> dict[str, Any]:
    from llm_finetune_kit.config import RunConfig
    from llm_finetune_kit.run import run

    phases = Phases()
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(case, min(50000, SHAPES[case.model]["vocab_size"]), Path(folder))
        config = RunConfig().with_values(values(case, model, rows, Path(folder) / "out"))
        result = run(config, phases.hear)
        phases.close("")
        plan = json.loads((result.folder.path / "plan.json").read_text())
    timed = phases.steps[min(WARM_UP, len(phases.steps) - 1) :]
    return {
        "peaks": phases.peaks,
        "peak": max(phases.peaks.values()),
        "tokens_per_second": sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed),
        "plan": {key: plan.get(key) for key in ("memory", "peak_memory", "time", "steps")},
        "tokens_per_pass": plan["config"]["training"]["tokens_per_pass"],
    }


def in_child(case: Case, place: Path) -> dict[str, Any]:
    """What a fresh process found. Raises RuntimeError with the end of what it said if it failed."""
    command = [sys.executable, __file__, "child", "--case", json.dumps(asdict(case)), "--models", str(place)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{case.name}: {ended.stderr.strip()[-1500:]}")
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


def run_cases(out: Path, wanted: list[str], place: Path) -> None:
    done = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.is_file() else set()
    for case in CASES:
        if case.name in done or not all(word in case.name.split() for word in wanted):
            continue
        folder = place / case.model
        if not (folder / "tokenizer.json").is_file():
            write_model(case.model, folder)
        started = time.perf_counter()
        try:
            told = in_child(case, place)
        except RuntimeError as error:
            print(f"failed: {error}", flush=True)
            continue
        entry = {"name": case.name, "case": asdict(case), "threads": os.environ.get("OMP_NUM_THREADS", ""), **told}
        with out.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{case.name}: {told['peak'] / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s", flush=True)


# --- the table ---------------------------------------------------------------------------------------------


def predicted(entry: dict[str, Any]) -> Any:
    """What today's plan says about a run that was measured."""
    from llm_finetune_kit.config import RunConfig
    from llm_finetune_kit.hardware import this_machine
    from llm_finetune_kit.models.shapes import facts_of
    from llm_finetune_kit.plan import DataFacts, make_plan

    case = Case(**entry["case"])
    config = RunConfig().with_values(values(case, Path(case.model), ("train", "held_out"), Path("out")))
    config = config.with_values({"training.tokens_per_pass": entry["tokens_per_pass"]})
    rows = case.batch * case.steps
    mean = (case.shortest + case.length) / 2 if case.shortest else case.length
    shape = {"n_embd": 768, "n_layer": 12, "n_head": 12} if case.model == "gpt2" else {}
    facts = facts_of(SHAPES[case.model] | shape | {"dtype": "bfloat16"}, case.model)
    data = DataFacts(rows, HELD_OUT, round(rows * mean), round(rows * mean), case.length)
    return make_plan(config, this_machine(), facts, data, force=True)


def table(out: Path) -> None:
    """Markdown: every run, then how large the errors of peak memory are."""
    import numpy as np

    errors = []
    print("| model | method | rows | recomputed | peak, GB | predicted, GB | error | worst moment |")
    print("|---|---|---|---|---|---|---|---|")
    for line in out.read_text().splitlines():
        entry = json.loads(line)
        case, plan = Case(**entry["case"]), predicted(entry)
        errors.append(plan.peak_memory / entry["peak"] - 1)
        rows = f"{case.batch} x {f'{case.shortest} to ' if case.shortest else ''}{case.length}"
        method = case.method + ("" if case.dtype == "bfloat16" else f", {case.dtype}")
        again = {0: "none", 1: "all"}.get(case.recompute, f"every {case.recompute}.")
        figures = f"{entry['peak'] / 1e9:.2f} | {plan.peak_memory / 1e9:.2f} | {errors[-1]:+.1%}"
        print(f"| {case.model} | {method} | {rows} | {again} | {figures} | {plan.moment} |")
    sizes = np.abs(errors)
    print(
        f"\n{len(errors)} runs: |error| p50 {np.quantile(sizes, 0.5):.1%}, p95 {np.quantile(sizes, 0.95):.1%}, "
        f"most under {min(errors):+.1%}, most over {max(errors):+.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "child"])
    parser.add_argument("--out", type=Path, default=Path("plan_accuracy.jsonl"))
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "plan_accuracy_models")
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must hold")
    parser.add_argument("--case", type=json.loads)
    asked = parser.parse_args()
    if asked.what == "child":
        case = Case(**asked.case)
        print(json.dumps(child(case, asked.models / case.model)))
    elif asked.what == "run":
        run_cases(asked.out, asked.only, asked.models)
    else:
        table(asked.out)


if __name__ == "__main__":
    main()
