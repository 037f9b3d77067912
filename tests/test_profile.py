"""Where the time of a step goes: what is watched, what it adds up to, and that watching changes nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.events import Event, Profiled, Stepped, Warned
from llm_finetune_kit.run import run
from llm_finetune_kit.terminal import Terminal
from llm_finetune_kit.training.profile import REST, TRACE, WARM, WATCHED

VALUES = {
    "model.name": "demo",
    "data.train_file": "sample:chat",
    "data.validation_split": 0,
    "model.max_length": 64,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "evaluation.compare": False,
    "evaluation.prompts": [],
}


def trained(out: Path, **values: object) -> tuple[list[Event], Path]:
    told: list[Event] = []
    asked = {name.replace("__", "."): value for name, value in values.items()}
    result = run(RunConfig().with_values(VALUES | {"output.output_dir": str(out)} | asked), told.append)
    return told, result.folder.path


def test_a_profile_says_where_the_time_of_a_step_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, folder = trained(tmp_path, training__max_steps=WARM + WATCHED, training__profile=True)
    (found,) = [event for event in told if isinstance(event, Profiled)]
    assert found.steps == WATCHED and sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.parts["matrix products"] > 0 and found.parts["attention"] > 0 and found.parts[REST] > 0
    assert found.products_per_second > 1e9
    trace = json.loads(gzip.decompress((folder / TRACE).read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert not (folder / "profile_trace.json").exists() and "profile of 3 steps" in (folder / "run.log").read_text()
    with Terminal() as terminal:
        for event in told:
            terminal(event)
    assert "matrix products made" in capsys.readouterr().out
    plain, _ = trained(tmp_path / "plain", training__max_steps=WARM + WATCHED)
    losses = [[event.loss for event in side if isinstance(event, Stepped)] for side in (told, plain)]
    assert losses[0] == losses[1], "watching changes nothing"


def test_a_run_too_short_to_be_watched_says_so(tmp_path: Path) -> None:
    told, folder = trained(tmp_path, training__max_steps=WARM, training__profile=True)
    assert any(isinstance(event, Warned) and "nothing was profiled" in event.message for event in told)
    assert not (folder / TRACE).exists()
