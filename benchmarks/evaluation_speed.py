"""What evaluating together saves: answers in one batch and losses in packed passes, against one by one, on this CPU.

    python benchmarks/evaluation_speed.py [bfloat16 | float32]

Processor time and wall time of both ways, taken in turns; the answers are compared too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from llm_finetune_kit.config import DataSection, GenerationSection
from llm_finetune_kit.data import prepare
from llm_finetune_kit.data.masks import Tokens
from llm_finetune_kit.evaluation.losses import row_losses
from llm_finetune_kit.evaluation.perplexity import rows_for
from llm_finetune_kit.generation import answers
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.opening import Opened, open_model

SAMPLES = Path(__file__).resolve().parents[1] / "src/llm_finetune_kit/assets/samples"
NAMES = ("instruct", "chat", "summarization", "code")
ROUNDS = 2


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What work gives, its processor time and its wall time."""
    processor, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, time.process_time() - processor, time.perf_counter() - wall


def compare(name: str, together: Callable[[], Any], alone: Callable[[], Any], same: Callable[[Any, Any], str]) -> None:
    """Both ways in turns, and the medians of their times and ratios."""
    together(), alone()  # the first time is slower
    rounds = [(timed(together), timed(alone)) for _ in range(ROUNDS)]
    at_once, one_by_one = ([float(np.median([pair[side][kind] for pair in rounds])) for kind in (1, 2)] for side in (0, 1))
    ratios = [float(np.median([pair[1][kind] / pair[0][kind] for pair in rounds])) for kind in (1, 2)]
    told = f"together {at_once[0]:.2f} s of processor ({at_once[1]:.2f} s wall), one by one {one_by_one[0]:.2f} s"
    faster = f"{ratios[0]:.1f} times faster ({ratios[1]:.1f} by wall)"
    print(f"{name}: {told} ({one_by_one[1]:.2f} s): {faster}; {same(rounds[0][0][0], rounds[0][1][0])}", flush=True)


def generation(opened: Opened) -> None:
    """64 prompts of 10 to 54 tokens, 64 new tokens at most."""
    prompts = [opened.chat.prompt_ids([{"role": "user", "content": row["prompt"]}]) for row in sample_rows()[:64]]
    how = GenerationSection(max_new_tokens=64)

    def alone() -> list[Any]:
        return [answers(opened.model, opened.chat, [ids], how)[0] for ids in prompts]

    with opened.objective.precision():
        compare(
            "answers to 64 prompts",
            lambda: answers(opened.model, opened.chat, prompts, how),
            alone,
            lambda a, b: f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)} answers are equal",
        )


def losses(opened: Opened, name: str, data: list[dict[str, str]]) -> None:
    """Losses of every row, packed and one row at a time in the same engine, and one at a time in plain transformers."""
    tokens = rows_for(opened, prepare.read(data, DataSection()), DataSection()).tokens
    label = f"losses of {len(tokens)} rows of {tokens.lengths.mean():.0f} tokens ({name})"
    compare(
        f"{label}, against the same engine",
        lambda: row_losses(opened.objective, tokens, opened.chat),
        lambda: row_losses(opened.objective, tokens, opened.chat, packing=False),
        lambda a, b: f"largest relative difference of a row {np.abs(a.loss / b.loss - 1).max():.1e}",
    )
    dtype = opened.model.get_input_embeddings().weight.dtype
    plain = AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=dtype).eval()
    compare(
        f"{label}, against plain transformers",
        lambda: row_losses(opened.objective, tokens, opened.chat),
        lambda: loop(plain, tokens),
        lambda a, b: f"mean losses {a.loss.sum() / a.targets.sum():.4f} and {b:.4f}",
    )


@torch.no_grad()
def loop(model: Any, tokens: Tokens) -> float:
    """The mean loss as it is usually computed: a row at a time, with labels, weighted by their number."""
    total, count = 0.0, 0
    for index in range(len(tokens)):
        ids, trained = (torch.from_numpy(part.copy())[None] for part in tokens.example(index))
        targets = int(trained[:, 1:].sum())
        total += float(model(input_ids=ids.long(), labels=ids.long().masked_fill(~trained, -100)).loss) * targets
        count += targets
    return total / count


def short_rows() -> list[dict[str, str]]:
    """Questions and answers of one sentence, out of the general set and the sample chat."""
    lines = (SAMPLES.parent / "general.jsonl").read_text(encoding="utf-8").splitlines()
    general = [row for line in lines if "prompt" in (row := json.loads(line))]
    cut = [{"prompt": row["prompt"], "response": row["response"].split("\n")[0]} for row in sample_rows()]
    return general + cut


def sample_rows() -> list[dict[str, str]]:
    """The rows of four sample sets."""
    rows = [row for name in NAMES for row in json.loads((SAMPLES / f"{name}.json").read_text(encoding="utf-8"))]
    return [{"prompt": row.get("prompt") or row["instruction"], "response": row.get("response") or row["output"]} for row in rows]


def main() -> None:
    for dtype in sys.argv[1:] or ("bfloat16", "float32"):
        opened = open_model("demo", dtype=dtype)
        print(dtype)
        generation(opened)
        losses(opened, "one sentence", short_rows())
        losses(opened, "whole answers", sample_rows())


if __name__ == "__main__":
    main()
