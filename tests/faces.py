"""Running the command line the way a user does: in a process of its own, with its time and its imports watched."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FINETUNE = [sys.executable, "-m", "llm_finetune_kit"]
HEAVY = ("torch", "transformers", "peft", "matplotlib", "huggingface_hub", "datasets")

# Python imports this before anything else: a process that loads a heavy package ends at once.
WALL = f"""\
import os, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            os.write(2, f"HEAVY IMPORT of {{name}}".encode())
            os._exit(99)
sys.meta_path.insert(0, Wall())
"""


@dataclass(frozen=True)
class Done:
    """What a process said and how it ended; `seconds` is wall time and `work` the processor time of it."""

    code: int
    out: str
    err: str
    seconds: float
    work: float


def start(command: list[str], folder: Path, environment: dict[str, str] | None = None, *, light: bool = False) -> Done:
    """Run a command in `folder`; with `light` it must not load a heavy package."""
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    ours = {"PYTHONPATH": str(ROOT / "src"), "LLM_FINETUNE_KIT_CACHE": str(folder / ".cache"), "OMP_NUM_THREADS": "1"}
    here = clean | ours | (environment or {})
    if light:
        wall = folder / ".wall"
        wall.mkdir(exist_ok=True)
        (wall / "sitecustomize.py").write_text(WALL)
        here["PYTHONPATH"] = f"{wall}{os.pathsep}{here['PYTHONPATH']}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=here, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(done.returncode, done.stdout, done.stderr, seconds, work)


def finetune(folder: Path, *words: str, environment: dict[str, str] | None = None, light: bool = False) -> Done:
    return start([*FINETUNE, *words], folder, environment, light=light)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line run in this process."""
    from llm_finetune_kit.cli import main

    try:
        code = main(list(words))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err
