"""The commands of R0, word for word, run in a copy of the repository against a hub that serves a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faces import ROOT, Done, start
from hub import Hub, one_layer
from llm_finetune_kit.models.locate import demo_folder
from loopback import serving
from test_settings import R0_VALUES

Run = Callable[..., Done]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has after `git clone`."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("main.py", "configs", "data", "src"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def python_main(place: Path) -> Iterator[Run]:
    source = ROOT.parent / "shared/data/models/stories260K-hf"
    if not source.is_dir():
        pytest.skip("the folder with real models is not here")
    hub = Hub({"TinyLlama/TinyLlama-1.1B-Chat-v1.0": one_layer(source, place / ".served")})

    def run(*words: str) -> Done:
        done = start([sys.executable, "main.py", *words], place, hub.environment | {"HF_HOME": str(place / ".home")})
        assert "Traceback" not in done.err
        return done

    with serving(hub):
        yield run


@pytest.fixture(scope="module")
def trained(python_main: Run) -> Done:
    return python_main("--mode", "train")


@pytest.fixture(scope="module")
def trained_for_long(trained: Done, python_main: Run) -> Done:
    short = ["training.batch_size=1", "training.gradient_accumulation_steps=1", "data.max_samples=4"]
    return python_main("--mode", "train", "training.max_steps=1000", "training.save_steps=500", *short)


def test_train_with_the_default_configuration(trained: Done, place: Path) -> None:
    """python main.py --mode train"""
    assert trained.code == 0, trained.err
    run = place / "outputs/tinyllama-finetune"
    done = json.loads((run / "resolved.json").read_text())["config"]
    for section, values in R0_VALUES.items():
        assert {name: done[section][name] for name in values} == values, section
    assert done["method"] == "lora"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"):
        assert (run / "final" / name).is_file()
    adapter = json.loads((run / "final/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 32, 0.1)
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    rows = json.loads((place / "data/train.json").read_text())
    steps = 3 * -(-len(rows) // 16)
    assert f"{steps} steps of 16 examples" in trained.out
    assert "warm-up takes 100 of 6 steps" in trained.err, "values that do not suit so few rows are told, not changed"


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(trained: Done, python_main: Run) -> None:
    """The default configuration on the example data takes 6 steps, so it leaves no checkpoint-1000."""
    done = python_main("--mode", "eval", "--model_path", "outputs/checkpoint-999")
    assert done.code == 2
    assert "no run has a checkpoint-999" in done.err and "outputs/tinyllama-finetune/checkpoint-6" in done.err
    assert done.work < 3  # an import of torch would take longer


@pytest.mark.skipif(not demo_folder().is_dir(), reason="the demo model is being trained")
def test_train_with_a_custom_config(python_main: Run, place: Path) -> None:
    """python main.py --mode train --config configs/custom_config.yaml"""
    done = python_main("--mode", "train", "--config", "configs/custom_config.yaml")
    assert done.code == 0, done.err
    assert (place / "outputs/custom/final/adapter_model.safetensors").is_file()


def test_a_long_run_has_a_checkpoint_1000(trained_for_long: Done, place: Path) -> None:
    assert trained_for_long.code == 0, trained_for_long.err
    run = place / "outputs/tinyllama-finetune-2"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-500", "checkpoint-1000"}
    assert "all steps done: 1,000 steps" in trained_for_long.out, "two evaluations are too few to stop early"


def test_evaluate_a_model(trained_for_long: Done, python_main: Run) -> None:
    """python main.py --mode eval --model_path outputs/checkpoint-1000"""
    done = python_main("--mode", "eval", "--model_path", "outputs/checkpoint-1000")
    assert done.code == 0, done.err
    lines = {line.split()[0]: line.split() for line in done.out.splitlines() if line}
    assert lines["model"][:3] == ["model", "loss", "perplexity"]
    assert float(lines["tuned"][1]) < float(lines["base"][1])
    assert done.err.startswith("note: outputs/checkpoint-1000 means outputs/")


def test_run_inference(trained_for_long: Done, python_main: Run) -> None:
    """python main.py --mode inference --model_path outputs/final --prompt "Explain machine learning" """
    done = python_main("--mode", "inference", "--model_path", "outputs/final", "--prompt", "Explain machine learning")
    assert done.code == 0, done.err
    assert done.out.strip() and done.err.startswith("note: outputs/final means outputs/")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--mode"),
        (["--mode", "dance"], "choose from train, eval, evaluate, inference"),
        (["--mode", "tarin"], "did you mean train?"),
        (["--mode", "train", "--model_pth", "x"], "did you mean --model-path?"),
        (["--mode", "train", "word"], "is not of the form section.key=value"),
        (["--mode", "inference"], "no prompt is given"),
        (["--mode", "train", "--config", "configs/training_confg.yaml"], "did you mean configs/training_config.yaml?"),
        (["--mode", "train", "lora.r=0", "--config", "configs/gpt2.yaml", "lora.alpha=0"], "lora.alpha is 0"),
        (["--mode", "eval", "--model-path", "outputs/nowhere/final"], "no run has a final"),
    ],
)
def test_a_wrong_word_is_told(words: list[str], told: str, place: Path) -> None:
    done = start([sys.executable, "main.py", *words], place, light=True)
    assert done.code == 2 and told in done.err and "Traceback" not in done.err
    assert done.err.startswith("error[") and "\n  fix:  " in done.err and "usage:" not in done.err
