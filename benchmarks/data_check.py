"""How long the quality report takes for a million short rows, how much memory it needs, and whether it finds what is there.

    python benchmarks/data_check.py [--rows 1000000]

Writes a seeded JSON lines file with known defects into a temporary folder, checks it in a fresh process (reading,
formatting and inspecting) and prints time, peak memory and what was found of what was planted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ASKS = (
    "Write a short note about",
    "What is the use of",
    "Give three reasons for",
    "Explain to a child what is meant by",
    "Describe",
)
ANSWERS = ("A good example is", "In short, it depends on", "The main points are", "Most people would name")

CHECK = """
import json, resource, sys, time
from llm_finetune_kit.data.formats import detect, to_examples
from llm_finetune_kit.data.quality import inspect_data
from llm_finetune_kit.data.sources import read_source
marks = [time.perf_counter()]
source = read_source(sys.argv[1]); marks.append(time.perf_counter())
formatted = to_examples(source, detect(source, None), on_bad_rows="drop", system_prompt=None); marks.append(time.perf_counter())
report = inspect_data(source, formatted); marks.append(time.perf_counter())
print(json.dumps({
    "seconds": [round(after - before, 1) for before, after in zip(marks, marks[1:])],
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "found": {found.kind: found.count for found in report.findings},
}))
"""


def generate(path: Path, rows: int) -> dict[str, int]:
    """Write rows of about 20 words, of which each defect takes up a known number, and return these numbers."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randrange(4, 9))) for _ in range(20_000)]
    each = rows // 200

    def row() -> dict[str, str]:
        ask = f"{rng.choice(ASKS)} {' '.join(rng.choices(words, k=5))}"
        return {"instruction": ask, "input": "", "output": f"{rng.choice(ANSWERS)} {' '.join(rng.choices(words, k=9))}."}

    planted = dict.fromkeys(("exact_duplicates", "near_duplicates", "empty_answers", "mojibake", "secrets"), each)
    seen: list[dict[str, str]] = []
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            kind = list(planted)[index % 200] if index % 200 < len(planted) and index >= 200 else ""
            made = row()
            if kind == "exact_duplicates":
                made = dict(rng.choice(seen))
            elif kind == "near_duplicates":
                made = {**(first := rng.choice(seen)), "output": f"{first['output']} {rng.choice(words)}"}
            elif kind == "empty_answers":
                made["output"] = " "
            elif kind == "mojibake":
                made["output"] += " Itâ€™s true."
            elif kind == "secrets":
                made["output"] += " AKIA" + "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", k=16))
            elif len(seen) < 5 * each:
                seen.append(made)
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
    return {kind: count - (rows >= 200) for kind, count in planted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        planted = generate(path, rows)
        size = path.stat().st_size
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=True)
        wall = time.perf_counter() - started
    told = json.loads(done.stdout)
    reading, formatting, inspecting = told["seconds"]
    print(
        f"{rows:,} rows, {size / 1e6:.0f} MB: {wall:.1f} s (reading {reading}, formatting {formatting}, inspecting {inspecting})"
    )
    print(f"peak memory {told['peak_gb']:.2f} GiB")
    for kind, count in planted.items():
        print(f"{kind:<18} planted {count:>6,}   found {told['found'].pop(kind, 0):>6,}")
    print("also found:", told["found"] or "nothing")


if __name__ == "__main__":
    main()
