"""Everything that is to be known of this engine on a GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py --data shared/data --out gpu-results

Correctness, memory against the plan, tokens a second against Trainer + PEFT in the same run, and how often a step waits. Every
section is a process of its own under a limit of time, so that none takes another down with it; what is known is written after
each to results.json and results.md. `--dry-run` rehearses all of it on a CPU with tiny shapes, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = {
    "checks": 100,
    "GPT-2 124M LoRA": 85,
    "TinyLlama LoRA": 85,
    "Llama-3.1-8B LoRA": 95,
    "Llama-3.1-8B QLoRA": 95,
}  # 460 s in all
FIRST_LOSS = 5e-3  # relative, of the first step: whoever is farther from ours did other work


def run_section(name: str, data: Path | None, out: Path, dry: bool) -> None:
    """One section in this process; what is found is written to its file at once."""
    import torch

    from gpu_checks import check
    from gpu_parts import Place
    from gpu_speed import CASES, measure

    device = torch.device("cpu" if dry else "cuda")
    place, found = Place(device, data, dry), {}

    def keep(part: str, value: Any) -> None:
        found[part] = value
        whole = file_of(out, name)
        written = whole.with_suffix(".part")
        written.write_text(json.dumps(found, indent=1))
        written.replace(whole)  # the process may be stopped at any time

    if name == "checks":
        keep("machine", machine(device))
        check(place, keep)
    else:
        measure(place, CASES[name], keep)


def machine(device: Any) -> dict[str, Any]:
    import torch

    from llm_finetune_kit.hardware import versions

    known = {"versions": versions(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    if device.type != "cuda":
        return known | {"device": "a CPU: a rehearsal, whose figures mean nothing"}
    facts = torch.cuda.get_device_properties(device)
    capability = f"{facts.major}.{facts.minor}"
    return known | {"device": facts.name, "memory": facts.total_memory, "capability": capability, "cuda": torch.version.cuda}


def file_of(out: Path, name: str) -> Path:
    return out / f"{name.replace(' ', '-')}.json"


def run_child(name: str, args: argparse.Namespace) -> str | None:
    """A section in a process of its own; why it did not come to its end, or None."""
    command = [sys.executable, __file__, "--section", name, "--out", str(args.out)]
    command += ["--data", str(args.data)] if args.data else []
    command += ["--dry-run"] if args.dry_run else []
    with (args.out / f"{name.replace(' ', '-')}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS[name]).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {SECONDS[name]} s"
    return None if code == 0 else f"ended with code {code}, see its log"


def gather(out: Path, ends: dict[str, str | None]) -> dict[str, Any]:
    """What all sections have found so far, and how those ended that are over."""
    found = {name: json.loads(file_of(out, name).read_text()) for name in SECONDS if file_of(out, name).exists()}
    return {name: found.get(name, {}) | ({"ended": end} if end else {}) for name, end in ends.items()}


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    checks = dict(results.get("checks", {}))
    about = checks.pop("machine", {})
    lines = ["# On a GPU", "", f"{about.get('device', 'unknown')}, {about.get('date', '')}, {about.get('versions', {})}", ""]
    lines += ["| check | error | limit | holds |", "|---|---|---|---|"]
    for name, found in checks.items():
        lines.append(check_line(name, found))
    for name, found in results.items():
        if name != "checks":
            lines += ["", f"## {name}", "", *speed_lines(found)]
    return "\n".join(lines) + "\n"


def check_line(name: str, found: Any) -> str:
    if not isinstance(found, dict) or "value" not in found:
        return f"| {name} | {found} | | |"
    return f"| {name} | {found['value']:.1e} | {found['limit']:.0e} | {'yes' if found['holds'] else '**no**'} |"


def speed_lines(found: dict[str, Any]) -> list[str]:
    """A table of who computed how fast; whose first loss is not ours is not comparable and gets no speed."""
    rate = found.get("matmul_tflops")
    reference = (found.get("ours") or {}).get("first_loss")
    small = (found.get("ours, small steps") or {}).get("first_loss")
    lines = [f"Matrix products: {rate:.0f} TFLOP/s." if isinstance(rate, float) else f"Matrix products: {rate}.", ""]
    lines += ["| | tokens/s | share of the matrix rate | GB allocated | GB predicted |", "|---|---|---|---|---|"]
    for name, one in found.items():
        if not isinstance(one, dict) or "tokens_per_second" not in one:
            continue
        expected = small if "small" in name else reference
        if not expected or abs(one["first_loss"] - expected) > FIRST_LOSS * expected:
            lines.append(f"| {name} | not comparable: first loss {one['first_loss']:.4f}, ours {expected} | | | |")
            continue
        share = f"{one['model_tflops'] / rate:.1%}" if "model_tflops" in one and isinstance(rate, float) else ""
        sizes = [f"{one[key] / 1e9:.2f}" if key in one else "" for key in ("memory_allocated", "memory_predicted")]
        lines.append(f"| {name} | {one['tokens_per_second']:,.0f} | {share} | {sizes[0]} | {sizes[1]} |")
    rest = {name: one for name, one in found.items() if isinstance(one, dict) and "tokens_per_second" not in one}
    lines += ["", *(f"- {name}: {one}" for name, one in rest.items())]
    return lines + ([f"- {found['ended']}"] if "ended" in found else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with configs/, sft/ and tokenizers/gpt2/; a rehearsal needs none")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to see that the script works")
    parser.add_argument("--section", choices=SECONDS, help="only this one, in this process")
    args = parser.parse_args()
    if args.data is None and not args.dry_run:
        parser.error("--data is needed for the shapes and the lengths of real models and documents")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        run_section(args.section, args.data, args.out, args.dry_run)
        return
    ends: dict[str, str | None] = {}
    for name in SECONDS:
        began = time.perf_counter()
        ends[name] = run_child(name, args)
        results = gather(args.out, ends)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        (args.out / "results.md").write_text(page(results))
        print(f"{name}: {ends[name] or 'done'} ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"results in {args.out / 'results.md'}")


if __name__ == "__main__":
    main()
