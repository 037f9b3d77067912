"""What saving costs: the same run with checkpoints and without, in turns, in wall time of its training.

    python benchmarks/survival/cost.py --rounds 3 --out cost.json

Time is taken from the first step to the last word about training (a step or a checkpoint), on random weights of real
models' shapes, with the embedded model's data. Odd rounds begin with saving, even ones without.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.events import Event, Saved, Stepped
from llm_finetune_kit.files import write_json
from llm_finetune_kit.hardware import versions
from llm_finetune_kit.run import run
from runs_to_kill import make_model

CASES = {
    "demo, LoRA, saved every 2 steps": {"model.name": "demo", "training.save_steps": 2},
    "124 M, LoRA, saved every 5 steps": {"training.save_steps": 5},
    "124 M, full fine-tuning, saved once in 20 steps": {"training.save_steps": 20, "method": "full"},
}
STEPS = 40
NEVER = 10_000


def training_seconds(values: dict[str, Any], place: Path, saves: bool) -> tuple[float, list[Saved]]:
    """Wall seconds of the training of a run, and its checkpoints."""
    steps: list[float] = []
    saved: list[Saved] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stepped):
            steps.append(time.perf_counter())
        elif isinstance(event, Saved) and event.folder != "final" and event.step < STEPS:
            saved.append(event)  # that of the last step stands outside of the time
            steps.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=place) as outputs:
        common = {
            "data.train_file": "sample:chat",
            "data.validation_split": 0.0,
            "training.max_steps": STEPS,
            "training.batch_size": 4,
            "training.gradient_accumulation_steps": 1,
            "training.num_epochs": 100.0,
            "evaluation.generation.max_new_tokens": 1,
            "output.output_dir": outputs,
        }
        mute = {} if saves else {"training.save_steps": NEVER}
        run(RunConfig().with_values(common | values | mute), listen)
    return max(steps) - min(steps), saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("saving_cost.json"))
    parser.add_argument("--work", type=Path, default=None, help="folder on the disk to be measured (default: the temporary one)")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        place = Path(name)
        make_model(place / "model", hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)
        for title, values in list(CASES.items())[: asked.cases]:
            values = {"model.name": str(place / "model")} | values
            ratios, checkpoints = [], []
            training_seconds(values, place, False)  # kernels and caches
            for number in range(asked.rounds):
                order = (True, False) if number % 2 else (False, True)
                seconds = {}
                for saves in order:
                    seconds[saves], saved = training_seconds(values, place, saves)
                    checkpoints += saved
                ratios.append(seconds[True] / seconds[False])
            found[title] = {
                "with_over_without": [round(ratio, 4) for ratio in ratios],
                "median": round(statistics.median(ratios), 4),
                "seconds_without": round(seconds[False], 2),
                "checkpoints_a_run": len(checkpoints) / asked.rounds,
                "megabytes": round(statistics.median(event.size_bytes for event in checkpoints) / 1e6, 1),
                "write_seconds": round(statistics.median(event.seconds for event in checkpoints), 3),
                "held_up_seconds": round(statistics.median(event.held_up for event in checkpoints), 4),
            }
            print(title, json.dumps(found[title]), flush=True)
    facts = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "system": platform.platform()}
    write_json(asked.out, facts | {"threads": torch.get_num_threads(), "cases": found})


if __name__ == "__main__":
    main()
