"""benchmarks/gpu.py in rehearsal: the script that a GPU is asked with works before there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu


def test_a_model_is_measured_and_told(tmp_path: Path) -> None:
    name = "TinyLlama LoRA"
    gpu.run_section(name, None, tmp_path, dry=True)
    found = json.loads(gpu.file_of(tmp_path, name).read_text())
    failed = {part: one for part, one in found.items() if isinstance(one, dict) and "failed" in one}
    assert not failed
    assert found["ours, Liger's kernels"]["first_loss"] == pytest.approx(found["ours"]["first_loss"], rel=1e-3)
    assert found["ours"]["first_loss"] == pytest.approx(found["Trainer, padded"]["first_loss"], rel=gpu.FIRST_LOSS)
    told = gpu.page(gpu.gather(tmp_path, {"checks": "stopped after 100 s", name: None}))
    assert "| ours | " in told and "not comparable" not in told


def test_who_did_other_work_gets_no_speed() -> None:
    ours, theirs = ({"tokens_per_second": 1234.0, "first_loss": loss} for loss in (5.0, 5.1))
    lines = "\n".join(gpu.speed_lines({"matmul_tflops": 1.0, "ours": ours, "Trainer, padded": theirs}))
    assert "| ours | 1,234 |" in lines
    assert "Trainer, padded | not comparable" in lines


def test_all_sections_together_stay_within_eight_minutes() -> None:
    assert sum(gpu.SECONDS.values()) <= 480
