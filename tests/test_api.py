"""The Python face: R1's patterns word for word, and what a program may rely on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_finetune_kit
from faces import ROOT
from llm_finetune_kit import (
    KitError,
    QuickTrainer,
    RunConfig,
    SimpleTrainer,
    get_available_models,
    load_dataset,
    load_model,
    load_sample_dataset,
    prepare_dataset,
    resume,
    run,
)
from llm_finetune_kit.events import Evaluated, Event, Finished, Sampled, Stepped
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.runs import find_run

ROWS = [{"prompt": f"What is {number} plus one?", "response": f"It is {number + 1}."} for number in range(12)]


def quiet(event: Event) -> None:
    """A listener that keeps the terminal clean."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpt2(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 says `gpt2`; a tiny model stands behind that name here."""
    shutil.copytree(stories, "gpt2")


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert llm_finetune_kit.__all__ == sorted(llm_finetune_kit.__all__)
    for name in llm_finetune_kit.__all__:
        assert getattr(llm_finetune_kit, name) is not None
    promised = {"load_model", "load_dataset", "prepare_dataset", "get_available_models", "load_sample_dataset"}
    assert promised | {"QuickTrainer", "SimpleTrainer", "KitError", "run", "resume", "RunConfig"} <= set(llm_finetune_kit.__all__)
    assert set(llm_finetune_kit.__all__) <= set(dir(llm_finetune_kit))
    with pytest.raises(AttributeError, match="has no attribute 'QuickTrainr'"):
        llm_finetune_kit.QuickTrainr  # noqa: B018


def test_star_import_in_a_fresh_process_gives_exactly_the_public_names() -> None:
    code = "from llm_finetune_kit import *; print(sorted(name for name in dir() if not name.startswith('_')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == str(llm_finetune_kit.__all__)


def test_pattern_1_of_r1_three_lines(gpt2: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
from llm_finetune_kit import QuickTrainer

trainer = QuickTrainer("gpt2", "sample:chat")
trainer.train()
"""
    names: dict[str, Any] = {}
    exec(code.replace('"sample:chat")', '"sample:chat", max_steps=3, max_new_tokens=8)'), names)  # the same lines, made short
    trainer = names["trainer"]
    assert trainer.result.folder.finished
    assert trainer.ask("What are your hours?", max_new_tokens=8)
    said = capsys.readouterr()
    assert "all steps done: 3 steps" in said.out and "step 3/3" in said.err


def test_pattern_2_of_r1_step_by_step(gpt2: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_data.json").write_text(json.dumps(ROWS))
    # R1's own lines, with 5 steps for its 100
    model, tokenizer, _ = load_model("gpt2")
    dataset = load_dataset("my_data.json")
    prepared = prepare_dataset(dataset, tokenizer)

    trainer = SimpleTrainer(model, tokenizer, prepared, max_steps=5, max_new_tokens=4)
    trainer.train()
    final = trainer.save()

    assert final == trainer.result.folder.final and (final / "adapter_model.safetensors").is_file()
    losses = [event.loss for event in trainer.result.folder.replay() if isinstance(event, Stepped)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert trainer.model is trainer.result.model
    copy = trainer.save("kept/here")
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in final.iterdir())
    with pytest.raises(KitError, match="there is something already"):
        trainer.save("kept/here")


def test_what_was_saved_opens_in_plain_peft(gpt2: None) -> None:
    result = QuickTrainer("gpt2", ROWS, listen=quiet, max_steps=2, max_new_tokens=4).train()
    shutil.copytree(result.folder.final, "elsewhere")
    from peft import AutoPeftModelForCausalLM

    assert AutoPeftModelForCausalLM.from_pretrained("elsewhere").peft_config["default"].r == 16


def test_a_listener_hears_every_event_and_nothing_is_printed(gpt2: None, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[Event] = []
    result = QuickTrainer("gpt2", ROWS, listen=heard.append, max_steps=2, max_new_tokens=4, validation_split=0.25).train()
    assert [event.step for event in heard if isinstance(event, Stepped)] == [1, 2]
    assert isinstance(heard[-1], Finished)
    assert {type(event) for event in heard} >= {Evaluated, Sampled, Finished}
    assert [event for event in heard if isinstance(event, Stepped)] == [
        event for event in result.folder.replay() if isinstance(event, Stepped)
    ]
    said = capsys.readouterr()
    assert said.out == "" and said.err == ""


def test_rows_given_as_a_list_are_kept_and_the_run_can_be_resumed(gpt2: None) -> None:
    class Enough(Exception):
        pass

    def stop_after_two(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise Enough

    with pytest.raises(Enough):
        QuickTrainer("gpt2", ROWS, listen=stop_after_two, max_steps=4, save_steps=2, max_new_tokens=4, run_name="cut").train()
    folder = find_run("cut", Path("outputs"))
    assert not folder.finished
    stored = [json.loads(line) for line in (folder.path / "train_rows.jsonl").read_text().splitlines()]
    assert stored == ROWS
    resumed = resume(folder)
    whole = QuickTrainer("gpt2", ROWS, listen=quiet, max_steps=4, save_steps=2, max_new_tokens=4, run_name="whole").train()
    losses = [[event.loss for event in one.folder.replay() if isinstance(event, Stepped)] for one in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_run_is_the_same_door(gpt2: None) -> None:
    config = RunConfig.model_validate(
        {"model": {"name": "gpt2"}, "data": {"train_file": ROWS}, "training": {"max_steps": 2, "save_steps": 1}}
    )
    first = run(config)
    second = QuickTrainer("gpt2", ROWS, listen=quiet, max_steps=2, save_steps=1, max_new_tokens=4).train()
    losses = [[event.loss for event in one.folder.replay() if isinstance(event, Stepped)] for one in (first, second)]
    assert losses[0] == losses[1]
    assert isinstance(first.folder, RunFolder) and first.folder.path != second.folder.path, "a run never overwrites another"


def test_a_loaded_model_tells_what_it_is(gpt2: None) -> None:
    model, tokenizer, facts = load_model("gpt2", dtype="float32")
    assert tokenizer.name_or_path == "gpt2", "not where its files are: the adapter will name its base by this"
    assert (facts.name, facts.dtype, facts.parameters) == ("gpt2", "float32", 260_032)
    assert next(model.parameters()).dtype.is_floating_point and tokenizer.eos_token_id is not None


def test_the_models_that_have_a_short_name_are_listed() -> None:
    names = get_available_models()
    assert {"demo", "gpt2", "gpt2-medium", "tinyllama", "mistral-7b", "phi-3-mini"} <= set(names)


def test_datasets_load_from_files_lists_and_samples() -> None:
    Path("rows.json").write_text(json.dumps(ROWS))
    Path("rows.csv").write_text("prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS))
    assert load_dataset("rows.json") == load_dataset(ROWS) == load_dataset("rows.csv") == load_dataset(Path("rows.json")) == ROWS
    assert len(load_sample_dataset("chat")) == len(load_dataset("sample:chat")) == 20
    assert len(load_sample_dataset("instruct")) == 20
    assert load_dataset("rows.json").name == "rows.json"


def test_a_prepared_dataset_says_what_became_of_its_rows(gpt2: None) -> None:
    _, tokenizer, _ = load_model("gpt2")
    prepared = prepare_dataset(load_dataset(ROWS), tokenizer)
    assert len(prepared) == len(ROWS)
    assert prepared.report["format"] == "prompt-response" and prepared.report["rows"] == len(ROWS)
    everything = prepare_dataset(load_dataset(ROWS), tokenizer, loss_on="all")
    assert everything.tokens.targets.sum() > prepared.tokens.targets.sum()


WRONG = {
    "an unknown model": lambda: load_model("gtp2"),
    "no such file": lambda: load_dataset("nowhere.json"),
    "an unknown sample": lambda: load_sample_dataset("chta"),
    "rows of no known shape": lambda: load_dataset([{"left": "a", "right": "b"}]),
    "rows that are none": lambda: load_dataset([1, 2, 3]),
    "an unknown setting": lambda: QuickTrainer("gpt2", ROWS, max_step=3),
    "a value that cannot be": lambda: QuickTrainer("gpt2", ROWS, max_steps=-3),
    "a wrong type": lambda: QuickTrainer("gpt2", 42),
    "no model": lambda: QuickTrainer("nothing-like-it", ROWS).train(),
    "asked before training": lambda: QuickTrainer("gpt2", ROWS).ask("Hello?"),
    "no run of this name": lambda: find_run("nothing", Path("outputs")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_user_can_put_right_is_a_kit_error(wrong: str) -> None:
    with pytest.raises(KitError) as caught:
        WRONG[wrong]()
    assert caught.value.fix and 2 <= caught.value.exit_code <= 7
    assert str(caught.value).startswith(f"error[{caught.value.code}] ")


def test_paths_are_as_good_as_their_names() -> None:
    config = QuickTrainer(Path("models/mine"), Path("rows.jsonl")).config
    assert (config.model.name, config.data.train_file) == ("models/mine", "rows.jsonl")


def test_a_trainer_that_has_not_trained_has_nothing_to_save(gpt2: None) -> None:
    model, tokenizer, _ = load_model("gpt2")
    with pytest.raises(KitError, match="nothing is trained yet"):
        SimpleTrainer(model, tokenizer, ROWS).save()
