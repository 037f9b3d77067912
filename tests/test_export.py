"""An adapter merged into its base: the same answers in plain transformers, all or nothing on the disk, nothing else touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from faces import FINETUNE
from llm_finetune_kit.cli import main
from llm_finetune_kit.config import GenerationSection
from llm_finetune_kit.errors import MachineError, ModelError, UsageError
from llm_finetune_kit.export import merged
from llm_finetune_kit.export.merged import export_merged
from llm_finetune_kit.files import damage
from llm_finetune_kit.run import run
from llm_finetune_kit.settings import load_config

QUESTION = "How do I reset my password?"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with LoRA in float32."""
    values = {
        "model.name": "demo",
        "model.dtype": "float32",
        "data.train_file": "sample:chat",
        "training.max_steps": 6,
        "training.learning_rate": 3e-3,
        "evaluation.compare": False,
        "output.output_dir": str(tmp_path_factory.mktemp("export")),
    }
    return run(load_config(values=values)[0]).folder.path


@pytest.fixture(scope="module")
def whole(tuned: Path) -> Path:
    """Its export."""
    found = export_merged(str(tuned), tuned.parent / "merged")
    assert found.dtype == "float32" and found.difference < 1e-3 < found.largest and found.quantized is None
    return found.folder


def test_fault_129_an_export_answers_in_plain_transformers_as_the_adapter_does(tuned: Path, whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_finetune_kit.api import generate

    model, tokenizer = AutoModelForCausalLM.from_pretrained(whole), AutoTokenizer.from_pretrained(whole)
    asked = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    how = GenerationSection(max_new_tokens=24)
    expected = generate(str(tuned), QUESTION, how=how, dtype="float32")
    assert (
        tokenizer.decode(made, skip_special_tokens=True).strip()
        == expected
        == generate(str(whole), QUESTION, how=how, dtype="float32")
    )
    assert expected != generate("demo", QUESTION, how=how, dtype="float32")
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert str(tuned) not in "".join(path.read_text() for path in whole.iterdir() if path.suffix in (".json", ".md", ".jinja"))
    card = (whole / "README.md").read_text()
    assert "library_name: transformers" in card and "peft" not in card.split("## How to use it")[1] and "CC BY-SA 4.0" in card


def test_fault_128_merging_rounds_and_no_more(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = export_merged(str(tuned), tmp_path / "short", dtype="bfloat16")
    assert 1e-4 < found.difference < 0.05 * found.largest
    monkeypatch.setitem(merged.LIMIT, "bfloat16", 1e-6)
    with pytest.raises(ModelError, match="from the adapter's") as refused:
        export_merged(str(tuned), tmp_path / "none", dtype="bfloat16")
    assert "float32" in refused.value.fix and not (tmp_path / "none").exists()


def test_fault_127_what_is_there_stays_unless_it_is_an_earlier_export(tuned: Path, whole: Path, tmp_path: Path) -> None:
    before = (whole / "manifest.json").read_text()
    with pytest.raises(UsageError, match="there is something already"):
        export_merged(str(tuned), whole)
    assert (whole / "manifest.json").read_text() == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="only a folder that this command wrote"):
        export_merged(str(tuned), mine, overwrite=True)
    assert (mine / "notes.txt").read_text() == "keep"
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    export_merged(str(tuned), copy, overwrite=True, dtype="bfloat16")
    assert damage(copy) is None and json.loads((copy / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run / "final", "would replace its adapter"),
        (lambda run: run / "final" / "inside", "would replace its adapter"),
        (lambda run: run.parent / "no" / "such", "parent folder does not exist"),
    ],
)
def test_a_place_that_cannot_be_is_refused(tuned: Path, change: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export_merged(str(tuned), change(tuned))


def test_fault_130_a_damaged_adapter_is_not_exported(tuned: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    weights = copy / "final" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="cannot be trusted"):
        export_merged(str(copy), tmp_path / "out")
    with pytest.raises(ModelError, match="no adapter"):
        export_merged("demo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_told_before_the_model_is_loaded(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Path) -> Any:
        return SimpleNamespace(free=9_000_000)

    monkeypatch.setattr(shutil, "disk_usage", full)
    monkeypatch.setattr(merged, "open_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(MachineError, match="needs about 18 MB of disk and 9 MB are free"):
        export_merged(str(tuned), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", full)
    assert export_merged(str(tuned), tmp_path / "out", dtype="bfloat16").size_bytes > 8_900_000  # half the bytes: there is room


@pytest.mark.parametrize("fault", ["write:1:kill", "rename:2:kill", "sync:3:ENOSPC"])
def test_fault_125_126_a_kill_or_a_full_disk_leaves_all_or_nothing(tuned: Path, tmp_path: Path, fault: str) -> None:
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    environment = {**os.environ, "FINETUNE_FAULT": fault, "OMP_NUM_THREADS": "1"}
    words = [*FINETUNE, "export", str(tuned), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not (tmp_path / "out").exists(), done.stderr
    assert {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()} == before
    if fault.endswith("ENOSPC"):
        assert done.returncode == 5 and "MACHINE-018" in done.stderr and not list(tmp_path.iterdir())


def test_the_command_says_how_near_the_merged_model_is(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tuned), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(tmp_path / "out") and told["difference"] < 1e-3
    assert torch.isfinite(torch.tensor(told["largest"]))
    assert main(["export", str(tuned)]) == 2 and "--out is missing" in capsys.readouterr().err
