"""LoRA on a CPU, against other trainers: models of several shapes, short and long documents, two threads.

Freezes the inputs once, then runs every contender as a child process in its own environment, round after round,
forwards and backwards in turn. Speed is printed only for contenders that pass the equality gate.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gate
import machine
import report
from report import Run
from shapes import SHAPES, flops_per_token

SOURCES = {"alpaca": "Alpaca", "prompted": "Alpaca behind its own trainer's words", "long": "the long rows of Dolly"}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Contender:
    """A child script, the environment it runs in, and what the gate holds it to."""

    name: str
    precision: str
    environment: str = ""  # runs in the environment venv-NAME; without a name, in the benchmark's own
    own_batches: bool = False  # packs documents itself, so its steps hold other documents
    shapes: tuple[str, ...] = tuple(SHAPES)  # the shapes that its library knows


CONTENDERS = [
    Contender("seeds", "float32"),
    Contender("hf_dynamic", "bfloat16"),
    Contender("hf_best", "bfloat16"),
    Contender("hf_compiled", "bfloat16"),
    Contender("trl_default", "bfloat16", environment="trl"),
    Contender("trl_best", "bfloat16", environment="trl", own_batches=True),
    Contender("trl_compiled", "bfloat16", environment="trl", own_batches=True),
    Contender("unsloth_default", "bfloat16", environment="unsloth"),
    Contender("unsloth_best", "bfloat16", environment="unsloth"),
    Contender("unsloth_compiled", "bfloat16", environment="unsloth", shapes=("tinyllama", "demo")),
    Contender("llama_factory_default", "bfloat16", environment="llamafactory"),
    Contender("llama_factory_best", "bfloat16", environment="llamafactory", own_batches=True),
    Contender("litgpt_default", "bfloat16", environment="litgpt", shapes=("tinyllama",)),
    Contender("litgpt_best", "bfloat16", environment="litgpt", shapes=("tinyllama",)),
    Contender("ours_whole", "bfloat16"),
    Contender("ours", "bfloat16"),
]


@dataclass(frozen=True)
class Bench:
    """The settings of one benchmark run and the folders it uses."""

    shape: str
    lengths: str
    data: Path
    out: Path
    rounds: int
    warmup: int
    steps: int
    base: str
    environments: Path
    contenders: list[Contender]

    @property
    def frozen(self) -> Path:
        return self.out / "frozen"

    def python(self, contender: Contender) -> str:
        own = self.environments / f"venv-{contender.environment}" / "bin/python"
        return str(own) if contender.environment else sys.executable


def child_env(folder: Path) -> dict[str, str]:
    """Two threads, no network, no accelerator, and a compile cache of its own for each child."""
    fixed = {
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    return {**os.environ, **fixed}


def run_child(script: str, python: str, folder: Path, options: list[str]) -> machine.Child:
    """Run a script of this folder in a fresh `folder`, its output in log.txt."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    launched = ["--launched-at", repr(time.time())] if script.startswith("contenders/") else []
    command = [python, str(HERE / script), "--out", str(folder), *options, *launched]
    child = machine.run_child(command, folder / "log.txt", child_env(folder))
    shutil.rmtree(folder / "inductor", ignore_errors=True)
    return child


def freeze(bench: Bench) -> dict[str, Any]:
    """Write the frozen inputs, unless those of an earlier run were made in the same way."""
    done = bench.frozen / "frozen.json"
    steps = bench.warmup + bench.steps
    scripts = "".join((HERE / name).read_text() for name in ("freeze.py", "frozen_model.py", "shapes.py"))
    recipe = {"shape": bench.shape, "lengths": bench.lengths, "steps": steps, "scripts": fingerprint(scripts)}
    frozen = json.loads(done.read_text()) if done.exists() else {}
    if frozen.get("recipe") != recipe:
        shutil.rmtree(bench.out / "reference", ignore_errors=True)
        options = ["--data", str(bench.data), "--shape", bench.shape, "--lengths", bench.lengths, "--steps", str(steps)]
        if run_child("freeze.py", sys.executable, bench.frozen, options).exit_code:
            raise SystemExit(f"freezing the inputs failed: {last_words(bench.frozen)}")
        # written last: its presence means that the rest is complete
        frozen = {**json.loads((bench.frozen / "description.json").read_text()), "recipe": recipe}
        done.write_text(json.dumps(frozen, indent=1))
    return dict(frozen)


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def step_options(bench: Bench) -> list[str]:
    return ["--frozen", str(bench.frozen), "--warmup", str(bench.warmup), "--steps", str(bench.steps)]


def read_result(folder: Path) -> dict[str, Any]:
    return {**json.loads((folder / "result.json").read_text()), "adapter": str(folder / "adapter.safetensors")}


def last_words(folder: Path) -> str:
    lines = (folder / "log.txt").read_text().strip().splitlines()
    return lines[-1] if lines else "no output"


def measure(bench: Bench, contender: Contender, number: int) -> Run:
    """Run one contender once; the verdict comes later."""
    folder = bench.out / f"round-{number}" / contender.name
    child = run_child(f"contenders/{contender.name}.py", bench.python(contender), folder, step_options(bench))
    print(f"round {number}: {contender.name} {'failed' if child.exit_code else 'done'}", flush=True)
    if child.exit_code:
        return Run(contender.name, number, None, None, child.foreign_load, last_words(folder))
    return Run(contender.name, number, read_result(folder), None, child.foreign_load)


def measure_all(bench: Bench) -> list[Run]:
    """All rounds; every second one runs backwards, so that a steady drift of the machine cancels out."""
    runs = []
    for number in range(1, bench.rounds + 1):
        order = bench.contenders if number % 2 else bench.contenders[::-1]
        runs += [measure(bench, contender, number) for contender in order]
    return runs


def reference_for(bench: Bench, documents: list[list[int]]) -> dict[str, Any]:
    """The float32 reference trained on exactly these documents; kept for runs with the same inputs."""
    key = json.dumps([documents, bench.warmup, (HERE / "contenders/reference.py").read_text()])
    folder = bench.out / "reference" / fingerprint(key)
    if not (folder / "result.json").exists():
        print("training the float32 reference", flush=True)
        batches = bench.out / "reference-batches.json"
        batches.write_text(json.dumps(documents))
        options = [*step_options(bench), "--batches-file", str(batches)]
        if run_child("contenders/reference.py", sys.executable, folder, options).exit_code:
            raise SystemExit(f"the reference failed: {last_words(folder)}")
    return read_result(folder)


def judge(bench: Bench, run: Run, frozen_batches: list[list[int]]) -> Run:
    """Add the gate's verdict to a finished run."""
    if run.result is None:
        return run
    contender = next(c for c in bench.contenders if c.name == run.contender)
    reference = reference_for(bench, run.result["documents"])
    initial = bench.frozen / "adapter" / "adapter_model.safetensors"
    verdict = gate.judge(run.result, reference, contender.precision, initial)
    if not contender.own_batches and run.result["documents"] != frozen_batches:
        verdict = replace(verdict, faults=[*verdict.faults, "its steps do not hold the frozen documents"])
    return replace(run, verdict=verdict)


def frozen_batches(bench: Bench, frozen: dict[str, Any]) -> list[list[int]]:
    """Which documents each step holds: freeze.py deals them out in order."""
    size = frozen["documents_per_step"]
    return [list(range(start, start + size)) for start in range(0, frozen["steps"] * size, size)]


def gemm_rates(frozen: dict[str, Any]) -> dict[str, float]:
    """GFLOP/s of this machine in the shape's first MLP product, measured now."""
    command = [sys.executable, str(HERE / "gemm.py"), *map(str, frozen["first_mlp"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def write_up(bench: Bench, frozen: dict[str, Any], facts: dict[str, Any], runs: list[Run]) -> str:
    """The Markdown page of this run."""
    gemm = facts["gemm_gflops"]["bfloat16"]
    names = [contender.name for contender in bench.contenders]
    rows = [report.row(runs, name, bench.base, flops_per_token(frozen), gemm) for name in names]
    machine_facts = facts["machine"]
    lines = [
        f"# LoRA on {SHAPES[bench.shape].title}, {bench.lengths} documents, CPU",
        "",
        report.table(rows, bench.base),
        "",
        *[f"- {note}" for note in report.notes(runs)],
        f"- {bench.rounds} rounds of {bench.warmup} warm-up and {bench.steps} timed steps; ratios are medians of "
        "paired rounds (min..max). Peak RSS counts mapped weight files. MFU is against the bfloat16 rate below.",
        f"- Data: {SOURCES[bench.lengths]}, mean {frozen['length_mean']:.0f} and median {frozen['length_median']} tokens, "
        f"{frozen['supervised_share']:.0%} supervised, {frozen['documents_per_step']} documents a step. "
        f"Contenders that pack fill one row of {frozen['max_length']:,} tokens a step instead.",
        f"- Machine: {machine_facts['cpu']}, {machine_facts['cores']} cores, {', '.join(machine_facts['flags'])}, "
        f"{machine_facts['memory_gib']} GiB; matrix products {gemm:.0f} GFLOP/s in bfloat16 and "
        f"{facts['gemm_gflops']['float32']:.0f} in float32; load average before {machine_facts['load_average']}.",
        *versions(bench, runs),
        f"- {facts['date']}: `{facts['command']}`",
    ]
    return "\n".join(lines) + "\n"


def versions(bench: Bench, runs: list[Run]) -> list[str]:
    """A line for each environment: what is installed in it."""
    found: dict[str, dict[str, str]] = {}
    for contender in bench.contenders:
        place = f"venv-{contender.environment}" if contender.environment else "the environment of the benchmark"
        for run in report.of(runs, contender.name):
            found.setdefault(place, {}).update(run.result["versions"] if run.result else {})
    return [
        f"- Versions in {place}: {', '.join(f'{k} {v}' for k, v in sorted(packages.items()))}."
        for place, packages in found.items()
    ]


def parse(arguments: list[str] | None = None) -> Bench:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--lengths", choices=SOURCES, default="alpaca")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with sft, configs, tokenizers")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench/speed", help="results go into a folder SHAPE-LENGTHS in it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=8, help="untimed steps; the adapter is compared after them")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--base", default="ours", choices=names, help="the contender the others are compared with")
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--environments", type=Path, default=ROOT / ".bench", help="folder with venv-trl and the others")
    args = vars(parser.parse_args(arguments))
    args["out"] /= f"{args['shape']}-{args['lengths']}"
    chosen = args.pop("contenders")
    return Bench(**args, contenders=[c for c in CONTENDERS if c.name in chosen and args["shape"] in c.shapes])


def check_environments(bench: Bench) -> None:
    """Say now, and not after an hour, that the environment of a contender is not there."""
    for contender in bench.contenders:
        if not Path(bench.python(contender)).exists():
            environment = f".bench/venv-{contender.environment}/.ready"
            raise SystemExit(f"{contender.name} needs {bench.python(contender)}: `make {environment}`, or leave it out")


def main() -> None:
    bench = parse()
    check_environments(bench)
    frozen = freeze(bench)
    facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine.describe(),
        "gemm_gflops": gemm_rates(frozen),
    }
    batches = frozen_batches(bench, frozen)
    runs = [judge(bench, run, batches) for run in measure_all(bench)]
    page = write_up(bench, frozen, facts, runs)
    results = {**facts, "frozen": frozen, "runs": [asdict(run) for run in runs]}
    # adapters are named by where they lie in the folder, so that the record can be kept elsewhere
    (bench.out / "results.json").write_text(json.dumps(results, indent=1).replace(f"{bench.out.as_posix()}/", ""))
    (bench.out / "results.md").write_text(page)
    print("\n" + page)


if __name__ == "__main__":
    main()
