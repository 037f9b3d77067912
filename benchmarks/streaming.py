"""A file larger than memory should hold: generate it, train on it, kill the run, go on, and watch the memory.

    python benchmarks/streaming.py --gigabytes 2 --steps 40

Prints the time of the first reading, the peak memory of the surveying and of the training process, and whether
a run that was killed and resumed has the same losses, bit for bit, as one that was not.
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
from pathlib import Path

WORDS = Path(__file__).read_text(encoding="utf-8").split() + [f"item {index}" for index in range(2000)]


def generate(path: Path, size: int) -> int:
    """Conversations of 20 to 120 words until the file has `size` bytes; how many there are."""
    generator = random.Random(7)
    written = rows = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            lines = []
            for _ in range(2000):
                words = generator.choices(WORDS, k=generator.randint(20, 120))
                row = {"prompt": f"Question {rows}: {' '.join(words[:8])}", "response": " ".join(words[8:])}
                lines.append(json.dumps(row) + "\n")
                rows += 1
            text = "".join(lines)
            written += len(text)
            file.write(text)
    return rows


def watched(command: list[str], *, until: str | None = None, log: Path) -> tuple[float, float]:
    """Run a command; its seconds and its peak resident memory in MB. With `until`, kill it when the log says so."""
    started, peak = time.perf_counter(), 0.0
    with open(log, "w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
                peak = max(peak, *(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")))
            except (OSError, ValueError, TypeError):
                pass
            if until and until in log.read_text(encoding="utf-8"):
                child.kill()
            time.sleep(0.2)
    if child.returncode and until is None:
        sys.exit(log.read_text(encoding="utf-8")[-2000:])
    return time.perf_counter() - started, peak


def losses(folder: Path) -> dict[int, float]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "Stepped"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        place = Path(name)
        data = place / "large.jsonl"
        rows = generate(data, round(asked.gigabytes * 1e9))
        print(f"{data.stat().st_size / 1e9:.2f} GB, {rows:,} rows", flush=True)
        os.environ["LLM_FINETUNE_KIT_CACHE"] = str(place / "cache")
        finetune = [sys.executable, "-m", "llm_finetune_kit"]
        options = [f"--output-dir={place / 'out'}", f"--max-steps={asked.steps}", "--max-length=512"]
        options += ["training.save_steps=5", "training.eval_steps=1000", "data.streaming=true"]
        options += ["evaluation.prompts=[hello]", "evaluation.generation.max_new_tokens=4"]
        train = [*finetune, "train", "--model=demo", f"--data={data}", *options]
        seconds, peak = watched([*train, "--dry-run"], log=place / "survey.log")
        print(f"first reading: {seconds:.0f} s, peak {peak:,.0f} MB", flush=True)
        seconds, peak = watched([*train, "--run-name=whole"], log=place / "whole.log")
        print(f"training {asked.steps} steps: {seconds:.0f} s, peak {peak:,.0f} MB", flush=True)
        half = f"step {asked.steps // 2}/"
        watched([*train, "--run-name=killed"], until=half, log=place / "killed.log")
        watched([*finetune, "resume", "killed", f"--output-dir={place / 'out'}"], log=place / "resumed.log")
        whole, resumed = losses(place / "out" / "whole"), losses(place / "out" / "killed")
        print(f"killed at about {half} and resumed: {len(resumed)} steps, losses identical: {whole == resumed}")


if __name__ == "__main__":
    main()
