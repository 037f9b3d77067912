"""The main job on the embedded model, and on real data with really trained models."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from conftest import DemoRun
from llm_finetune_kit.config import DataSection, RunConfig
from llm_finetune_kit.data import prepare
from llm_finetune_kit.evaluation.perplexity import measure
from llm_finetune_kit.events import Evaluated, Event, Finished, Sampled
from llm_finetune_kit.models.locate import demo_folder
from llm_finetune_kit.models.tokenizer import load_tokenizer
from llm_finetune_kit.run import run
from llm_finetune_kit.settings import changed

RUN_FOLDER = {
    "config.yaml",
    "resolved.json",
    "plan.json",
    "events.jsonl",
    "run.log",
    "debug.log",
    "data_report.json",
    "final",
    "eval_results.csv",
    "eval_results.json",
    "comparison.md",
    "loss_curve.png",
    "report.html",
}
FINAL = {
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "README.md",
    "manifest.json",
}


def test_the_embedded_model_is_small_and_says_where_it_comes_from() -> None:
    files = [path for path in demo_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    card = (demo_folder() / "README.md").read_text(encoding="utf-8")
    assert "bits per byte" in card and "CC BY-SA" in card


def test_the_demo_learns_in_a_minute_and_leaves_a_whole_run_folder(demo_run: DemoRun) -> None:
    told, result = demo_run.told, demo_run.result
    assert demo_run.work < 2 * 60  # of two cores
    evaluations = [event for event in told if isinstance(event, Evaluated)]
    assert min(event.loss for event in evaluations[1:]) < 0.7 * evaluations[0].loss
    before, *_, after = [event.answer for event in told if isinstance(event, Sampled)]
    assert before != after and "\n2. " in after  # the house style of the sample chat: numbered steps
    assert isinstance(told[-1], Finished)
    assert {path.name for path in result.folder.path.iterdir()} >= RUN_FOLDER
    assert {path.name for path in result.folder.final.iterdir()} >= FINAL


@pytest.mark.parametrize("model", ["stories260K-hf", "TinyStories-656K"])
@pytest.mark.parametrize(
    "data",
    [
        "sft/gsm8k_test.jsonl.gz",
        "dialogue/sgd_sharegpt_dev.jsonl.gz",
        "sft/llamafactory/alpaca_en_demo.json",
        "sft/llamafactory/v1_sft_demo.jsonl",
    ],
)
def test_real_models_learn_real_data_and_plain_peft_loads_the_result(shared: Path, tmp_path: Path, model: str, data: str) -> None:
    from peft import AutoPeftModelForCausalLM

    told: list[Event] = []
    asked = {
        "model.name": str(shared / "models" / model),
        "model.dtype": "float32",
        "data.train_file": str(shared / data),
        "data.on_bad_rows": "drop",
        "data.max_samples": 200,
        "training.max_steps": 4,
        "training.eval_steps": 4,
        "training.warmup_steps": 0,
        "output.output_dir": str(tmp_path),
    }
    result = run(changed(RunConfig(), asked), told.append)
    evaluations = [event.loss for event in told if isinstance(event, Evaluated)]
    assert evaluations[-1] < evaluations[0]
    ids = torch.arange(3, 40)[None]
    plain = AutoPeftModelForCausalLM.from_pretrained(result.folder.final, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.alone
def test_all_alpaca_rows_become_tokens_in_20_seconds_and_2_from_the_cache(shared: Path) -> None:
    chat = load_tokenizer(demo_folder())
    settings, path = DataSection(), str(shared / "sft" / "alpaca_data.json.gz")
    for limit in (20.0, 2.0):
        started = time.process_time()
        encoded = prepare.tokenize(prepare.read(path, settings), settings, chat, chat.fingerprint())
        assert time.process_time() - started < 2 * limit  # of the work of two cores
        assert encoded.report["rows"] == 52_002
        assert len(encoded.tokens) == 51_974  # 28 have an empty answer
        assert len(encoded.report["dropped"]) == 28


def test_another_tokenizer_reads_known_data_again_with_its_report(shared: Path) -> None:
    settings, path = DataSection(), str(shared / "sft" / "llamafactory" / "identity.json")
    for folder in (demo_folder(), shared / "models" / "stories260K-hf", demo_folder()):
        chat = load_tokenizer(folder)
        encoded = prepare.tokenize(prepare.read(path, settings), settings, chat, chat.fingerprint())
        assert encoded.report["rows"] == 91 and encoded.report["warnings"] == []
        assert encoded.report["fingerprint"] == encoded.fingerprint


def test_full_fine_tuning_gives_a_folder_that_plain_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    asked = {
        "model.name": "demo",
        "model.dtype": "float32",
        "method": "full",
        "data.train_file": "sample:instruct",
        "training.max_steps": 2,
        "training.learning_rate": 1e-3,
        "output.output_dir": str(tmp_path),
    }
    result = run(changed(RunConfig(), asked))
    plain = AutoModelForCausalLM.from_pretrained(result.folder.final)
    assert plain.dtype is torch.bfloat16  # as its base was stored
    trained = dict(result.model.named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, trained[name].to(torch.bfloat16)), name


def test_measuring_an_adapter_gives_the_base_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        "model.name": "demo",
        "data.train_file": "sample:chat",
        "training.max_steps": 3,
        "training.learning_rate": 3e-3,
        "training.batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "output.output_dir": str(tmp_path),
    }
    result = run(changed(RunConfig(), asked))
    found = measure(str(result.folder.path), "sample:chat")
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert found["base"]["bits_per_byte"] > 0
    alone = measure("demo", "sample:chat")["model"]
    assert alone["loss"] == pytest.approx(found["base"]["loss"], rel=1e-3)
    assert json.dumps(found)
