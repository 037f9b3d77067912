"""What it saves to compute beginnings that prompts share once: steps with and without it in random turns, two threads.

python benchmarks/speed.py --contenders ours --rounds 1      # once: freezes GPT-2's shape and rows of Alpaca
python benchmarks/sharing.py --rows 8 --prompt 300
"""

# ruff: noqa: E402
from __future__ import annotations

from llm_finetune_kit.hardware import share_the_machine

share_the_machine()

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "contenders"))
from common import IGNORED, Document, Job
from ours import frozen_objective

from llm_finetune_kit.data.batches import make_passes
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.data.prefixes import worth_sharing
from llm_finetune_kit.models.facts import model_facts
from llm_finetune_kit.training.step import Objective, accumulate

FROZEN = Path(__file__).resolve().parent.parent / ".bench/speed/gpt2-alpaca/frozen"
BUDGET = 2048  # tokens of a pass


def frozen_job(frozen: Path) -> tuple[Job, Objective]:
    """The frozen inputs in a folder, and their model and adapter in training, on two threads."""
    torch.set_num_threads(2)
    job = Job(frozen, frozen, 0, 0, 0.0)
    objective = frozen_objective(job.model_dir, job.adapter_dir)
    objective.model.train()
    return job, objective


def behind(prompt: np.ndarray, documents: list[Document]) -> Tokens:
    """The documents as rows, each behind the same prompt."""
    ids = [np.concatenate([prompt, document.input_ids]) for document in documents]
    trained = [np.concatenate([np.zeros(len(prompt), bool), np.asarray(one.labels) != IGNORED]) for one in documents]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    return Tokens(np.concatenate(ids).astype(np.int32), np.concatenate(trained), starts, np.arange(len(ids), dtype=np.int32))


def step(objective: Objective, rows: Tokens, sharing: int | None) -> dict[str, Any]:
    began = time.perf_counter()
    passes = make_passes(rows, range(len(rows)), BUDGET, sharing=sharing)
    loss = float(accumulate(objective, passes))
    seconds = time.perf_counter() - began
    objective.model.zero_grad()
    computed = sum(work.tokens for work in passes)
    return {"loss": loss, "seconds": seconds, "computed": computed, "tokens": computed + sum(work.shared for work in passes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frozen", type=Path, default=FROZEN)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--prompt", type=int, default=300, help="tokens before each row; 0 takes the rows as they are")
    parser.add_argument("--steps", type=int, default=4)
    asked = parser.parse_args()
    job, objective = frozen_job(asked.frozen)
    facts = model_facts(job.model_dir, "frozen")
    prompt = np.random.default_rng(0).integers(5, facts.vocabulary, asked.prompt)
    worth = worth_sharing(facts.block_parameters)
    found: dict[int | None, list[dict[str, Any]]] = {None: [], worth: []}
    for number in range(asked.steps + 1):  # the first one warms up
        rows = behind(prompt, job.pool[number * asked.rows : (number + 1) * asked.rows])
        for sharing in random.sample(list(found), 2):
            found[sharing].append(step(objective, rows, sharing))
    speeds = {
        way: sum(one["tokens"] for one in steps[1:]) / sum(one["seconds"] for one in steps[1:]) for way, steps in found.items()
    }
    share = sum(one["computed"] for one in found[worth][1:]) / sum(one["tokens"] for one in found[worth][1:])
    apart = max(abs(one["loss"] - other["loss"]) for one, other in zip(*found.values(), strict=True))
    print(f"a part must save {worth} tokens")
    print(f"whole {speeds[None]:.0f} tokens/s, shared {speeds[worth]:.0f}: {speeds[worth] / speeds[None]:.2f} times as fast")
    print(f"{share:.0%} of the tokens computed; losses at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
