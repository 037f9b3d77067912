"""Real runs of small models, base against tuned, and their tables for docs/results.md.

    OMP_NUM_THREADS=1 python benchmarks/results_table.py run     (goes on where it stopped; about half an hour)
    python benchmarks/results_table.py collect                   (figures, and answers to our prompts, to results/results.json)
    python benchmarks/results_table.py write                     (the tables of docs/results.md, from that file)

Every run is one command line, as a user would type it. Texts of the data stay in the run folders, as some of them may not be
passed on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import describe, run_child

FIGURES = Path(__file__).resolve().parent / "results" / "results.json"
PAGE = FIGURES.parents[2] / "docs" / "results.md"
MARKS = ("<!-- tables -->\n", "<!-- end of tables -->\n")
PROMPTS = FIGURES.with_name("prompts.txt")  # written for this project
MODELS = {"demo": "demo", "TinyStories-656K": "models/TinyStories-656K"}
DATA = {
    "Dolly": "sft/databricks-dolly-15k.jsonl.gz",
    "GSM8K": "sft/gsm8k_train.jsonl.gz",
    "Alpaca": "sft/alpaca_data.json.gz",
    "DailyDialog": "dialogue/dailydialog_text_8096.txt.gz",
}
SETTINGS = {
    "data.max_samples": 1200,
    "data.validation_split": 0.1,
    "data.on_bad_rows": "drop",
    "training.max_steps": 100,
    "training.eval_steps": 50,
    "training.seed": 42,
    "evaluation.rows": 64,
}
METHODS = {"LoRA": {}, "full": {"method": "full"}, "QLoRA": {"model.quantization": "nf4"}}
TEST = "sft/gsm8k_test.jsonl.gz"
OVERLAP = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
OUTCOMES = {"better": "better", "worse": "worse", "none": "not shown", "open": "–"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    data: str
    method: str = "LoRA"
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        parts = [self.model, self.data, self.method, f"lr{self.learning_rate}" if self.learning_rate else ""]
        return "-".join(filter(None, parts))

    def command(self, data: Path, out: Path) -> list[str]:
        """The command line after `finetune`."""
        model = self.model if self.model == "demo" else str(data / MODELS[self.model])
        knobs = SETTINGS | METHODS[self.method]
        if self.learning_rate:
            knobs |= {"training.learning_rate": self.learning_rate}
        where = ["--output-dir", str(out), "--run-name", self.name]
        settings = [f"{name}={value}" for name, value in knobs.items()]
        return ["train", "--model", model, "--data", str(data / DATA[self.data]), *settings, *where]


CASES = [
    *(Case(model, data) for data in DATA for model in ("TinyStories-656K", "demo")),
    Case("demo", "GSM8K", "full"),
    Case("demo", "GSM8K", "QLoRA"),
    Case("demo", "GSM8K", learning_rate=0.003),
]
ASKED = ("TinyStories-656K-Dolly-LoRA", "demo-Dolly-LoRA", "demo-GSM8K-LoRA")  # trained on what may be passed on
TESTED = [case for case in CASES if case.data == "GSM8K" and case.method == "LoRA" and not case.learning_rate]


# --- running -----------------------------------------------------------------------------------------------


def run(data: Path, out: Path) -> None:
    """Every run that has no result yet, and the comparisons on GSM8K's own test set."""
    out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if not (out / case.name / "eval_results.json").exists():
            _finetune(case.command(data, out), out / f"{case.name}.log", out / f"{case.name}.child.json")
    for case in TESTED:
        log = out / f"{case.name}.test.json"
        if not log.exists():
            _finetune(_test_command(case, data, out), log)
    for name, model in _answering(data, out).items():
        log = out / f"{name}.answers.jsonl"
        if not log.exists():
            words = ["--prompts", str(PROMPTS), "--max-new-tokens", "32", "--json"]
            _finetune(["generate", model, *words], log)


def _answering(data: Path, out: Path) -> dict[str, str]:
    """The models that answer the project's own prompts, and where they are."""
    return {"demo": "demo", "TinyStories-656K": str(data / MODELS["TinyStories-656K"])} | {
        name: str(out / name) for name in ASKED
    }


def _test_command(case: Case, data: Path, out: Path) -> list[str]:
    rows = ["--rows", "64", "--max-new-tokens", "128", "--seed", "42"]
    return ["compare", str(out / case.name), "--data", f"{data / TEST}[:200]", *rows, "--json"]


def _finetune(words: list[str], log: Path, kept: Path | None = None) -> None:
    import os

    print(shlex.join(["finetune", *words]), flush=True)
    unfinished = log.with_suffix(".unfinished")
    child = run_child([sys.executable, "-m", "llm_finetune_kit", *words], unfinished, dict(os.environ))
    if child.exit_code:
        raise SystemExit(f"exit code {child.exit_code}, see {unfinished}")
    unfinished.rename(log)
    if kept:
        kept.write_text(json.dumps(vars(child) | {"machine": describe()}))


# --- figures -----------------------------------------------------------------------------------------------


def collect(data: Path, out: Path) -> None:
    """Figures of all finished runs, without any text of theirs, as `results.json`."""
    found = [_figures(case, data, out) for case in CASES if (out / f"{case.name}.child.json").exists()]
    tests = [_tested(case, data, out) for case in TESTED if (out / f"{case.name}.test.json").exists()]
    logs = {name: out / f"{name}.answers.jsonl" for name in _answering(data, out)}
    answers = {name: _lines(log) for name, log in logs.items() if log.exists()}
    FIGURES.write_text(json.dumps({"runs": found, "tests": tests, "answers": answers}, indent=1) + "\n")


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def _figures(case: Case, data: Path, out: Path) -> Row:
    folder = out / case.name
    results, plan, resolved = (_read(folder / f"{name}.json") for name in ("eval_results", "plan", "resolved"))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if line]
    child = _read(out / f"{case.name}.child.json")
    steps = [event for event in events if event["event"] == "Stepped"]
    finished = next(event for event in events if event["event"] == "Finished")
    kept = ("step", "epoch", "loss", "gradient_norm", "learning_rate")
    return {
        **vars(case),
        "name": case.name,
        "command": shlex.join(["finetune", *case.command(data, out)]),
        "versions": resolved["versions"],
        "machine": {key: child["machine"][key] for key in ("cpu", "cores", "flags", "memory_gib")},
        "date": datetime.fromtimestamp(finished["time"], timezone.utc).date().isoformat(),
        "foreign_load": round(child["foreign_load"], 2),
        "wall_seconds": round(child["wall_seconds"], 1),
        "training_seconds": round(finished["summary"]["seconds"], 1),
        "tokens": finished["summary"]["tokens"],
        "peak_memory": plan["measured"]["peak_memory"],
        "forecast_seconds": plan["time"],
        "trained_parameters": plan["trained_parameters"],
        "rate": resolved["config"]["training"]["learning_rate"],
        "kept_step": results["step"],
        "evaluations": [{key: one[key] for key in ("step", "loss", "perplexity", "rows")} for one in results["evaluations"]],
        "steps": [{key: event[key] for key in kept} for event in steps if event["step"] % 20 == 0 or event["step"] == 1],
        **_compared(results["comparison"]),
    }


def _compared(comparison: Row) -> Row:
    """The figures of a comparison without prompts and answers."""
    general = {key: value for key, value in comparison["general"].items() if key != "sentence"}
    kept = {key: comparison[key] for key in ("outcome", "rows", "decoding", "interval", "wins", "speed")}
    return {**kept, "metrics": {one["name"]: one for one in comparison["metrics"]}, "general": general}


def _tested(case: Case, data: Path, out: Path) -> Row:
    command = shlex.join(["finetune", *_test_command(case, data, out)])
    return {**vars(case), "command": command, **_compared(_read(out / f"{case.name}.test.json"))}


def _read(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text[text.index("{") :])


# --- tables ------------------------------------------------------------------------------------------------


def write() -> None:
    """Put all tables between the marks of docs/results.md."""
    found = json.loads(FIGURES.read_text())
    runs = found["runs"]
    lora = [one for one in runs if one["method"] == "LoRA" and not one["learning_rate"]]
    methods = [one for one in runs if one["model"] == "demo" and one["data"] == "GSM8K"]
    parts = {
        "Before and after": _before_and_after(lora),
        "Overlap with the references": _overlap(lora),
        "How answers end": _manner(lora),
        "What was forgotten": _forgotten(lora),
        "Methods": _before_and_after(methods) + "\n\n" + _costs(methods) if len(methods) > 1 else "",
        "Training": _costs(lora),
        "Steps of demo on Dolly": _steps(next((one for one in lora if one["name"] == "demo-Dolly-LoRA"), None)),
        "GSM8K's test set": "\n\n".join(part(found["tests"]) for part in (_before_and_after, _overlap, _manner))
        if found["tests"]
        else "",
        "Answers": _answers(found["answers"]) if found["answers"] else "",
        "Commands": "```bash\n" + "\n".join(one["command"] for one in runs + found["tests"]) + "\n```",
    }
    text = "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items() if text)
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n{_where(runs)}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


def _where(runs: list[Row]) -> str:
    """Machine, versions and date of the runs."""
    machine, versions = runs[0]["machine"], runs[0]["versions"]
    size = f"{machine['cores']} cores of which a run uses one, {machine['memory_gib']} GiB"
    what = f"{machine['cpu']} ({', '.join(machine['flags'])}), {size}"
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    days = sorted({one["date"] for one in runs})
    return f"{what}; {told}; {' and '.join({days[0], days[-1]})}."


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _label(one: Row) -> list[str]:
    rate = f", rate {one['learning_rate']}" if one["learning_rate"] else ""
    return [one["model"], f"{one['data']}, {one['method']}{rate}"]


def _change(metric: Row, digits: int = 3) -> list[str]:
    """Difference with its interval, and what that shows."""
    if metric["low"] is None:
        return ["–", OUTCOMES[metric["outcome"]]]
    difference, low, high = (f"{metric[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return [f"{difference} ({low} to {high})", OUTCOMES[metric["outcome"]]]


def _before_and_after(runs: list[Row]) -> str:
    head = ["model", "data, method", "loss, base", "tuned", "difference (95 %)", "shown", "perplexity, base", "tuned", "rows"]
    lines = []
    for one in runs:
        loss, perplexity = one["metrics"]["loss"], one["metrics"]["perplexity"]
        losses = [f"{loss['base']:.3f}", f"{loss['tuned']:.3f}", *_change(loss)]
        surprise = [f"{perplexity['base']:.1f}", f"{perplexity['tuned']:.1f}"]
        lines.append([*_label(one), *losses, *surprise, f"{loss['rows']} ({one['wins']['won']} better)"])
    return _markdown(head, lines)


def _overlap(runs: list[Row]) -> str:
    """R4's table of BLEU and ROUGE, a line for the base and one for the tuned model, with what the intervals show."""
    lines = []
    for one in runs:
        model, data = _label(one)
        for side in ("base", "tuned"):
            cells = [_cell(one["metrics"].get(name), side) for name in OVERLAP]
            lines.append([f"{model} ({side})", data, *cells])
    return _markdown(["model", "data, method", *OVERLAP.values()], lines)


def _cell(metric: Row | None, side: str, digits: int = 4) -> str:
    """A value; beside the tuned model's stands what the interval of the difference shows, if anything."""
    if metric is None:
        return "–"
    shown = f" {OUTCOMES[metric['outcome']]}" if side == "tuned" and metric["outcome"] in ("better", "worse") else ""
    return f"{metric[side]:.{digits}f}{shown}"


def _manner(runs: list[Row]) -> str:
    """Whether answers end, how long they are, how much they repeat, and whether numbers are right."""
    names = {"stop_rate": "ended by itself", "length": "words", "repetition": "repetition", "numeric_match": "number right"}
    lines = []
    for one in runs:
        cells = []
        for name in names:
            metric = one["metrics"].get(name)
            cells.append(f"{metric['base']:.2f} to {_cell(metric, 'tuned', 2)}" if metric else "–")
        lines.append([*_label(one), *cells])
    return _markdown(["model", "data, method", *names.values()], lines)


def _forgotten(runs: list[Row]) -> str:
    lines = []
    for one in runs:
        general = one["general"]
        values = [f"{general['base']:.3f}", f"{general['tuned']:.3f}", f"{general['relative']:+.1%}"]
        lines.append([*_label(one), *values, *_change(general)])
    return _markdown(["model", "data, method", "base", "tuned", "change", "difference (95 %)", "shown"], lines)


def _costs(runs: list[Row]) -> str:
    """R4's table of training performance, with memory as R2 has it."""
    head = ["model", "data, method", "trained weights", "epochs", "time", "whole run", "others' load"]
    head += ["tokens/s", "memory", "planned"]
    lines = []
    for one in runs:
        memory = one["peak_memory"]
        speed = one["tokens"] / one["training_seconds"]
        times = [
            f"{one['training_seconds']:.0f} s",
            f"{one['wall_seconds']:.0f} s",
            f"{one['foreign_load']:.1f} cores",
            f"{speed:,.0f}",
        ]
        sizes = [f"{memory[key] / 1e9:.2f} GB" for key in ("measured", "predicted")]
        lines.append([*_label(one), f"{one['trained_parameters']:,}", f"{one['steps'][-1]['epoch']:.1f}", *times, *sizes])
    return _markdown([*head, "perplexity after"], [[*line, _after(one)] for line, one in zip(lines, runs, strict=True)])


def _after(one: Row) -> str:
    return f"{one['metrics']['perplexity']['tuned']:.1f}"


def _steps(one: Row | None) -> str:
    """R2's table of the training loss."""
    if one is None:
        return "not run"
    lines = []
    for row in one["steps"]:
        rate = f"{row['learning_rate']:.6f}"
        lines.append([str(row["step"]), f"{row['epoch']:.1f}", f"{row['loss']:.4f}", f"{row['gradient_norm']:.4f}", rate])
    return _markdown(["Step", "Epoch", "Loss", "Grad Norm", "Learning Rate"], lines)


def _answers(found: dict[str, list[Row]]) -> str:
    lines = []
    for said in zip(*found.values(), strict=True):
        told = (" ".join(one["answer"].replace("|", "/").split()) for one in said)
        lines += [[said[0]["prompt"], name, text or "(nothing)"] for name, text in zip(found, told, strict=True)]
    return _markdown(["prompt", "model", "answer, 32 tokens at most"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect", "write"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with models/, sft/ and dialogue/")
    parser.add_argument("--out", type=Path, default=Path(".bench/results"), help="folder for the runs")
    asked = parser.parse_args()
    if asked.what == "run":
        run(asked.data, asked.out)
    if asked.what == "collect":
        collect(asked.data, asked.out)
    if asked.what == "write":
        write()


if __name__ == "__main__":
    main()
