"""Fine-tune two small, really trained models on real data sets, and load each result with plain transformers and PEFT.

Prints a Markdown table: held-out loss before and after, and the largest difference between the logits of the trained model
in memory and those of `final/` loaded by `AutoPeftModelForCausalLM` (both float32, so it should be rounding).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM

from llm_finetune_kit import RunConfig, run
from llm_finetune_kit.events import Evaluated, Event
from llm_finetune_kit.settings import changed

MODELS = ("stories260K-hf", "TinyStories-656K")
DATA = (
    "sft/databricks-dolly-15k.jsonl.gz",
    "sft/gsm8k_train.jsonl.gz",
    "dialogue/sgd_sharegpt_train.jsonl.gz",
    "sft/llamafactory/alpaca_en_demo.json",
    "sft/llamafactory/identity.json",
    "sft/llamafactory/glaive_toolcall_en_demo.json",
    "sft/llamafactory/v1_sft_demo.jsonl",
    "sft/alpaca_data.json.gz",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with models/, sft/ and dialogue/")
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    print("| model | data | rows used | loss before | after | logits differ by | seconds |\n|---|---|---|---|---|---|---|")
    for model in MODELS:
        for data in DATA:
            print(one(asked.data / "models" / model, asked.data / data, asked.steps), flush=True)


def one(model: Path, data: Path, steps: int) -> str:
    """One run, as a row of the table."""
    told: list[Event] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = run(config(model, data, steps, folder), told.append)
        seconds = time.perf_counter() - started
        evaluations = [event for event in told if isinstance(event, Evaluated)]
        best = min(evaluations[1:], key=lambda event: event.loss)
        difference = logits_difference(result)
        report = (result.folder.path / "data_report.json").read_text()
    if best.loss >= evaluations[0].loss:
        raise SystemExit(f"{model.name} did not learn {data.name}: {evaluations[0].loss} -> {best.loss}")
    losses = f"{evaluations[0].loss:.3f} | {best.loss:.3f}"
    return f"| {model.name} | {data.name} | {rows_used(report)} | {losses} | {difference:.1e} | {seconds:.0f} |"


def config(model: Path, data: Path, steps: int, folder: str) -> RunConfig:
    asked = {
        "model.name": str(model),
        "model.dtype": "float32",
        "data.train_file": str(data),
        "data.on_bad_rows": "drop",
        "training.max_steps": steps,
        "training.eval_steps": steps,
        "output.output_dir": folder,
    }
    return changed(RunConfig(), asked)


def logits_difference(result: Any) -> float:
    """The largest difference of any logit between the model in memory and the saved one loaded by plain PEFT."""
    ids = torch.arange(3, 67)[None]
    plain = AutoPeftModelForCausalLM.from_pretrained(result.folder.final, dtype=torch.float32)
    with torch.no_grad():
        here = result.model.eval()(input_ids=ids).logits
        there = plain.eval()(input_ids=ids).logits
    return float((here - there).abs().max())


def rows_used(report: str) -> str:
    import json

    train = json.loads(report)["train"]
    return f"{train['examples']:,} of {train['rows']:,}"


if __name__ == "__main__":
    main()
