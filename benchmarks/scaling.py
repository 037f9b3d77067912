"""How the package's own speed and memory go with rows, length, model and threads; a long run; data preparation.

    python benchmarks/scaling.py            # the record: a quiet machine, at most 25 minutes
    python benchmarks/scaling.py --small    # one small point of each kind, to see that it works

Every point is a process of its own, and the points come in random order, so that a drift of the machine falls on all alike.
What is measured is kept at once: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Generator, arange, randint, tensor

import machine
import scaling_page
from freeze import alpaca_rows
from frozen_model import build_model, save_adapter
from llm_finetune_kit.models.facts import model_facts
from shapes import SHAPES, Lengths, Shape, lora_settings
from speed import child_env, last_words, run_child

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODELS = {
    **SHAPES,
    "smollm2": Shape("a SmolLM2-135M-shaped model", "smollm2-135m.config.json", "", "bfloat16", Lengths(1, 2048, 4)),
}
WARMUP, STEPS = 1, 2
LONG_RUN = 300  # steps
MANY_ROWS = 1_000_000

PREPARE = """
import json, resource, sys, time
from llm_finetune_kit import load_config
from llm_finetune_kit.material import prepare_run
began = time.perf_counter()
asked = ["model.name=demo", f"data.train_file={sys.argv[1]}", "data.on_bad_rows=drop"]
material = prepare_run(load_config(overrides=asked)[0], weights=False)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak_mib": peak, "examples": len(material.train) + len(material.held_out)}))
"""


@dataclass(frozen=True)
class Point:
    """One setting that is measured: documents of the same length, every token of them learned."""

    model: str
    rows: int
    length: int
    threads: int = 2

    @property
    def name(self) -> str:
        return f"{self.model}-{self.rows}x{self.length}-{self.threads}t"


ROWS = [Point("gpt2", rows, 128) for rows in (1, 2, 4, 8, 16, 32)]
LENGTHS = [Point("smollm2", 2048 // length, length) for length in (32, 64, 128, 256, 512, 1024, 2048)]
SIZES = [Point(model, 4, 128) for model in ("demo", "gpt2", "smollm2", "tinyllama")]
THREADS = [Point(model, 4, 128, threads) for model in ("demo", "gpt2") for threads in (1, 2)]
PANELS = {"rows": ROWS, "length": LENGTHS, "model": SIZES, "threads": THREADS}


@dataclass(frozen=True)
class Scaling:
    """The settings of this run and the folders it uses."""

    data: Path
    out: Path
    repeats: int
    small: bool
    many_rows: int = MANY_ROWS

    @property
    def panels(self) -> dict[str, list[Point]]:
        return {name: [points[0]] for name, points in PANELS.items()} if self.small else PANELS

    @property
    def steps(self) -> int:
        """Of the long run."""
        return LONG_RUN // 10 if self.small else LONG_RUN

    @property
    def copied_rows(self) -> int:
        return 1000 if self.small else self.many_rows


class Measured:
    """What was measured so far, a line of JSON for each, under a key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found: dict[str, dict[str, Any]] = {found["key"]: found for found in map(json.loads, lines)}

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def keep(self, key: str, **values: Any) -> None:
        self.found[key] = {"key": key, "date": now(), **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.found[key]) + "\n")


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def turns(panels: dict[str, list[Point]], repeats: int) -> list[tuple[str, Point]]:
    """Every point once a repeat, also one that stands in two panels, each repeat in an order of its own."""
    points = list(dict.fromkeys(point for panel in panels.values() for point in panel))
    found = []
    for repeat in range(1, repeats + 1):
        order = random.Random(repeat).sample(points, len(points))
        found += [(f"{point.name} {repeat}", point) for point in order]
    return found


def frozen_model(asked: Scaling, name: str) -> Path:
    """The folder with a model and its first adapter, made when it is first needed."""
    folder = asked.out / "models" / name
    if not (folder / "adapter/adapter_config.json").exists():
        model = build_model(MODELS[name], asked.data)
        model.save_pretrained(folder / "model")
        save_adapter(model, lora_settings(model_facts(folder / "model", name)), folder / "adapter")
    return folder


def freeze_point(asked: Scaling, point: Point) -> Path:
    """Inputs of a point as contenders read them: random tokens, which cost what others do, and the model's own folder."""
    folder = asked.out / "frozen" / point.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = frozen_model(asked, point.model)
    for part in ("model", "adapter"):
        (folder / part).symlink_to((made / part).resolve())
    steps = WARMUP + STEPS
    documents = point.rows * steps
    vocabulary = model_facts(made / "model", point.model).vocabulary
    ids = randint(vocabulary, (documents * point.length,), generator=Generator().manual_seed(0))
    batches = arange(documents).view(steps, point.rows)
    lengths = tensor([point.length] * documents)
    save_file({"input_ids": ids, "labels": ids.clone(), "lengths": lengths, "batches": batches}, folder / "documents.safetensors")
    return folder


def trained(asked: Scaling, frozen: Path, warmup: int, steps: int, *more: str) -> tuple[dict[str, Any], float]:
    """What the package's own contender wrote, and the processor time of others meanwhile, in cores."""
    folder = asked.out / "child"
    options = ["--frozen", str(frozen), "--warmup", str(warmup), "--steps", str(steps), *more]
    child = run_child("contenders/ours.py", sys.executable, folder, options)
    if child.exit_code:
        raise SystemExit(f"{frozen.name} failed: {last_words(folder)}")
    return json.loads((folder / "result.json").read_text()), child.foreign_load


def measure_point(asked: Scaling, point: Point) -> dict[str, Any]:
    frozen = freeze_point(asked, point)
    result, load = trained(asked, frozen, WARMUP, STEPS, "--threads", str(point.threads))
    speed = result["real_tokens"] / sum(result["seconds"])
    return {**asdict(point), "tokens_per_second": speed, "peak_mib": result["peak_rss_mib"], "foreign_load": load}


def measure_long_run(asked: Scaling) -> dict[str, Any]:
    """The demo model on real Alpaca rows, four a step: what the process held after each step."""
    frozen = asked.out / "frozen/long-run"
    options = ["--data", str(asked.data), "--shape", "demo", "--lengths", "alpaca", "--steps", str(asked.steps)]
    if run_child("freeze.py", sys.executable, frozen, options).exit_code:
        raise SystemExit(f"freezing the long run failed: {last_words(frozen)}")
    result, load = trained(asked, frozen, 1, asked.steps - 1)
    return {"held_mib": [held / 2**20 for held in result["facts"]["held_bytes"]], "foreign_load": load}


def measure_preparation(asked: Scaling, copies: bool) -> dict[str, Any]:
    """All that a run does before it loads weights, without the cache: seconds and peak memory of a process of its own.

    With `copies` the rows come again and again, each with a number of its own.
    """
    rows = alpaca_rows(asked.data)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        count = asked.copied_rows if copies else len(rows[:1000] if asked.small else rows)
        with path.open("w", encoding="utf-8") as file:
            for number in range(count):
                row = rows[number % len(rows)]
                asks = f"{number}. {row['instruction']}" if copies else row["instruction"]
                file.write(json.dumps({**row, "instruction": asks}) + "\n")
        log = Path(name) / "log.txt"
        env = {**child_env(Path(name)), "LLM_FINETUNE_KIT_CACHE": str(Path(name) / "cache")}
        child = machine.run_child([sys.executable, "-c", PREPARE, str(path)], log, env)
        if child.exit_code:
            raise SystemExit(f"preparing {count:,} rows failed: {log.read_text()[-2000:]}")
        told = json.loads(log.read_text().splitlines()[-1])
        return {"rows": count, "file_mb": path.stat().st_size / 1e6, "foreign_load": child.foreign_load, **told}


def measure_all(asked: Scaling, measured: Measured) -> None:
    """Everything that was not measured yet, told as it is done."""
    for key, point in turns(asked.panels, asked.repeats):
        if key not in measured:
            measured.keep(key, **measure_point(asked, point))
            print(f"{key}: {measured.found[key]['tokens_per_second']:.0f} tokens/s", flush=True)
    if "long run" not in measured:
        measured.keep("long run", **measure_long_run(asked))
        print("long run done", flush=True)
    for key, copies in (("preparation", False), ("preparation of many", True)):
        if key not in measured and (asked.copied_rows or not copies):
            measured.keep(key, **measure_preparation(asked, copies))
            print(f"{key}: {measured.found[key]['seconds']:.0f} s", flush=True)


def parse(arguments: list[str] | None = None) -> Scaling:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with sft, configs, tokenizers")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench/scaling")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many-rows", type=int, default=MANY_ROWS, help="of the large preparation; 0 leaves it out")
    parser.add_argument("--small", action="store_true", help="one small point of each kind, in a folder beside the record")
    args = parser.parse_args(arguments)
    out = args.out.with_name(f"{args.out.name}-small") if args.small else args.out
    return Scaling(args.data, out, args.repeats, args.small, args.many_rows)


def main() -> None:
    asked = parse()
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    facts = {
        "date": now(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine.describe(),
    }
    measured = Measured(asked.out / "measured.jsonl")
    measure_all(asked, measured)
    panels = {name: [asdict(point) for point in points] for name, points in asked.panels.items()}
    results = {**facts, "panels": panels, "measured": list(measured.found.values())}
    page = scaling_page.page(facts, panels, measured.found)
    (asked.out / "results.json").write_text(json.dumps(results, indent=1))
    (asked.out / "scaling.svg").write_text(scaling_page.picture(panels, measured.found))
    (asked.out / "scaling.md").write_text(page)
    print("\n" + page)


if __name__ == "__main__":
    main()
