"""How far the plan's times are off: forecast without a probe, forecast after one, and the run that followed.

    OMP_NUM_THREADS=1 python benchmarks/plan_times.py run --out times.jsonl       (goes on where it stopped)
    python benchmarks/plan_times.py table --out times.jsonl

The probe and the whole run (`run()`: load, evaluate, answer, train, save, report) have a fresh process each, on random
weights of a real model's shape with random tokens in rows of ever new lengths. With one thread the clock leaves out what the
main thread waited for a core that other work held (`/proc/thread-self/schedstat`), so that a busy machine gives the times of
a quiet one; with more threads it is the plain clock, and the machine should be quiet. The table's forecasts are made by
today's plan from the rates and the probe that were measured then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan_accuracy import SHAPES, Case, values, write_model, write_rows

DEMO = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SHAPES["demo"] = DEMO
HABITS = {"training.eval_steps": 10, "training.save_steps": 10, "evaluation.generation.max_new_tokens": 16}
CASES = [
    Case("demo", "lora", 256, 16, shortest=32, steps=40),
    Case("demo", "full", 256, 16, shortest=32, steps=40),
    Case("gpt2", "lora", 128, 4, shortest=16, steps=20),
    Case("smollm2-135m", "lora", 128, 4, shortest=16, steps=20),
    Case("gpt2", "nf4", 128, 4, shortest=16, steps=20),
    Case("smollm2-135m", "full", 128, 4, shortest=16, steps=20),
    Case("llama-1b-4-layers", "lora", 128, 4, shortest=16, steps=20),
    Case("gpt2", "full", 128, 4, shortest=16, steps=20),
    Case("smollm2-135m", "lora", 256, 4, shortest=32, steps=20),
    Case("llama-1b-4-layers", "nf4", 128, 4, shortest=16, steps=20),
    Case("smollm2-135m", "nf4", 256, 4, shortest=32, steps=20),
    Case("llama-1b-4-layers", "full", 128, 4, shortest=16, steps=20),
    Case("gpt2", "lora", 512, 4, shortest=64, steps=20),
]


# --- measuring ---------------------------------------------------------------------------------------------


def alone(clock: Any = time.perf_counter) -> float:
    """Seconds, without those in which this thread was ready and another program had the core."""
    waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return float(clock() - waited / 1e9)


def configured(case: Case, place: Path, folder: Path) -> Any:
    from llm_finetune_kit.config import RunConfig

    rows = write_rows(case, min(50000, SHAPES[case.model]["vocab_size"]), folder)
    return RunConfig().with_values(values(case, place / case.model, rows, folder / "out") | HABITS)


def probed(case: Case, place: Path) -> dict[str, Any]:
    """What a probe finds, the machine's rates, and counts of the data."""
    from llm_finetune_kit.material import prepare_run
    from llm_finetune_kit.probe import probe

    with tempfile.TemporaryDirectory() as folder:
        material = prepare_run(configured(case, place, Path(folder)))
        from llm_finetune_kit.hardware import this_machine

        found = probe(material)
        return {"probe": asdict(found), "rates": asdict(this_machine().rates), "data": asdict(material.facts)}  # type: ignore[arg-type]


def ran(case: Case, place: Path) -> dict[str, Any]:
    """Seconds of the parts of a whole run, as a plan names them."""
    began = time.perf_counter()
    from llm_finetune_kit.run import run

    parts = {"start": 0.0, "training": 0.0, "evaluation": 0.0, "answers": 0.0, "saving": 0.0, "report": 0.0}
    last = [began, "start"]

    def hear(event: Any) -> None:
        kind, now = type(event).__name__, time.perf_counter()
        part = {"Stepped": "training", "Evaluated": "evaluation", "Saved": "saving", "Sampled": "answers"}.get(kind, last[1])
        if kind == "Stage":
            part = {"train": "start", "answer": "training"}.get(event.name, last[1])
        spent = event.seconds if kind == "Evaluated" else now - last[0]  # the first one follows the loading
        parts[part] += spent
        parts["start"] += now - last[0] - spent
        last[:] = now, "report" if kind == "Finished" else last[1]

    with tempfile.TemporaryDirectory() as folder:
        run(configured(case, place, Path(folder)), hear)
        hear(None)
    return {"parts": parts, "total": sum(parts.values())}


def measure(case: Case, place: Path) -> dict[str, Any]:
    import torch

    if not (place / case.model / "tokenizer.json").is_file():
        write_model(case.model, place / case.model)
    found = {
        "name": case.name,
        "case": asdict(case),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "torch": torch.__version__,
    }
    for what in ("probed", "ran"):
        command = [sys.executable, __file__, what, "--case", json.dumps(asdict(case)), "--models", str(place)]
        environment = {"GOMP_SPINCOUNT": "2000"} | os.environ
        began = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if ended.returncode:
            raise RuntimeError(f"{case.name}: {ended.stderr.strip()[-1500:]}")
        found |= json.loads(ended.stdout.splitlines()[-1]) | {f"{what}_wall": time.perf_counter() - began}
    return found


# --- the table ---------------------------------------------------------------------------------------------


def forecasts(entry: dict[str, Any]) -> list[Any]:
    """The `time` of today's plan without the probe that was made then, and with it."""
    from dataclasses import replace

    from llm_finetune_kit.config import RunConfig
    from llm_finetune_kit.hardware import Rates, this_machine
    from llm_finetune_kit.models.shapes import facts_of
    from llm_finetune_kit.plan import DataFacts, make_plan
    from llm_finetune_kit.plan.speed import Measured

    case = Case(**entry["case"])
    shape = {"n_embd": 768, "n_layer": 12, "n_head": 12} if case.model == "gpt2" else {}
    facts = facts_of(SHAPES[case.model] | shape | {"dtype": "bfloat16"}, case.model)
    config = RunConfig().with_values(values(case, Path(case.model), ("train", "held_out"), Path("out")) | HABITS)
    machine = replace(this_machine(), rates=Rates(**entry["rates"]), bfloat16=True)
    data = DataFacts(**entry["data"])
    return [
        make_plan(config, machine, facts, data, force=True, measured=measured).time
        for measured in (None, Measured(**entry["probe"]))
    ]


def row(entry: dict[str, Any]) -> tuple[str, list[float]]:
    """A line of the table, and the errors of training after a probe, the whole run after one, and training without."""
    case, (before, after) = Case(**entry["case"]), forecasts(entry)
    was, whole = entry["parts"]["training"], entry["total"]
    errors = [after["training"] / was - 1, after["total"] / whole - 1, before["training"] / was - 1]
    head = f"| {case.model} | {case.method} | {case.batch} x {case.shortest} to {case.length} | {case.steps} "
    training = f"| {before['training']:.0f} | {after['training']:.0f} | {was:.0f} | {errors[0]:+.0%} "
    total = f"| {before['total']:.0f} | {after['total']:.0f} | {whole:.0f} | {errors[1]:+.0%} | {entry['probe']['seconds']:.0f} |"
    return head + training + total, errors


def table(out: Path) -> None:
    heads = "training: no probe | probe | measured | error | whole run: no probe | probe | measured | error | probe took"
    print(f"| model | method | rows | steps | {heads} |\n|{'---|' * 13}")
    errors = []
    for line in out.read_text().splitlines():
        told, off = row(json.loads(line))
        print(told)
        errors.append(off)
    names = ("training, probed", "whole run, probed", "training, not probed")
    for name, column in zip(names, zip(*errors, strict=True), strict=True):
        sizes = sorted(map(abs, column))
        print(f"{name}: middle |error| {sizes[len(sizes) // 2]:.0%}, most under {min(column):+.0%}, most over {max(column):+.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "probed", "ran"])
    parser.add_argument("--out", type=Path, default=Path("plan_times.jsonl"))
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "plan_accuracy_models")
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must hold")
    parser.add_argument("--case", type=json.loads)
    asked = parser.parse_args()
    if asked.what in ("probed", "ran"):
        from llm_finetune_kit.hardware import this_machine

        this_machine()  # its rates are the best of many moments, which the other clock is not fine enough for
        if os.environ.get("OMP_NUM_THREADS") == "1":
            time.perf_counter = alone
        print(json.dumps({"probed": probed, "ran": ran}[asked.what](Case(**asked.case), asked.models)))
    elif asked.what == "table":
        table(asked.out)
    else:
        done = {json.loads(line)["name"] for line in asked.out.read_text().splitlines()} if asked.out.is_file() else set()
        for case in CASES:
            if case.name not in done and all(word in case.name.split() for word in asked.only):
                entry = measure(case, asked.models)
                with asked.out.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                print(row(entry)[0], flush=True)


if __name__ == "__main__":
    main()
