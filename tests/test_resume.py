"""A run can be killed at any moment and goes on to the same end, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import BusyError, DataError, Interrupted, KitError, ModelError, TrainingError, UsageError
from llm_finetune_kit.events import Evaluated, Event, Failed, Resumed, Sampled, Saved, Stepped, Warned
from llm_finetune_kit.files import MANIFEST, damage
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.run import resume, run
from nursery import Nursery
from story import digest, story

STEPS, SAVE_EVERY = 12, 3
METHODS = ("lora", "full")
ROWS = 40
NAMES = ("Lily", "Tom", "Mia", "Ben", "Sue", "Tim")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 40,000 weights with a real tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(stories / name, folder)
    return folder


def write_rows(path: Path, count: int = ROWS) -> Path:
    rows = [
        {"prompt": f"What did {NAMES[n % 6]} see {'far ' * (n % 5)}away?", "response": f"It was a {'big ' * (n % 7)}cat, {n}."}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(model: Path, outputs: Path, method: str = "lora", **more: Any) -> RunConfig:
    values = {
        "model.name": str(model),
        "method": method,
        "lora.dropout": 0.1 if method == "lora" else 0.0,
        "data.train_file": str(outputs.parent / "rows.jsonl"),
        "data.validation_split": 0.2,
        "training.batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": 3e-3,
        "training.max_steps": STEPS,
        "training.save_steps": SAVE_EVERY,
        "training.eval_steps": 4,
        "training.early_stopping_patience": 100,
        "training.tokens_per_pass": 256,
        "evaluation.prompts": ["Who?"],
        "evaluation.sample_steps": 5,
        "evaluation.generation.max_new_tokens": 4,
        "output.output_dir": str(outputs),
        "output.run_name": "run",
    }
    outputs.mkdir(parents=True, exist_ok=True)
    if not (outputs.parent / "rows.jsonl").exists():
        write_rows(outputs.parent / "rows.jsonl")
    return RunConfig().with_values(values | {name.replace("__", "."): value for name, value in more.items()})


class Crash(Exception):
    """Stands for a process that dies: nothing after it is done."""


def crash_when(when: Callable[[Event], bool]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if when(event):
            raise Crash

    return listen


def crashed(config: RunConfig, when: Callable[[Event], bool]) -> RunFolder:
    """A run that dies where `when` says."""
    with pytest.raises(Crash):
        run(config, crash_when(when))
    folder = RunFolder(Path(config.output.output_dir) / str(config.output.run_name))
    assert not folder.finished
    return folder


def at_step(number: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Stepped) and event.step == number


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder by its hash; the lock's text names its last holder."""
    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The story of an uninterrupted run of a method."""

    @functools.cache
    def told(method: str) -> dict[str, Any]:
        outputs = tmp_path_factory.mktemp(f"whole-{method}") / "outputs"
        return story(run(asked(model, outputs, method)).folder)

    return told


@pytest.fixture(scope="module")
def broken_off(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], RunFolder]:
    """A copy of a LoRA run that died at step 11, with checkpoints of steps 4, 6, 8 and 9 or the like."""
    outputs = tmp_path_factory.mktemp("broken") / "outputs"
    original = crashed(asked(model, outputs), at_step(11))

    def copy(place: Path) -> RunFolder:
        return RunFolder(Path(shutil.copytree(original.path, place / "run")))

    return copy


# --- in one process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_twice_is_the_same_bit_for_bit(
    method: str, model: Path, whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    again = story(run(asked(model, tmp_path / "outputs", method)).folder)
    assert again == whole(method)
    assert len(again["steps"]) == STEPS


def test_fault_083_the_random_state_matters_here(model: Path, whole: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """The tests below mean nothing unless dropout is at work."""
    without = story(run(asked(model, tmp_path / "outputs", lora__dropout=0.0)).folder)
    assert without["steps"][1:] != whole("lora")["steps"][1:]


@pytest.mark.parametrize(("method", "step"), [("lora", 1), ("lora", 3), ("lora", 7), ("full", 2), ("full", 12)])
def test_fault_080_a_run_that_died_after_any_step_goes_on_bit_for_bit(
    method: str, step: int, model: Path, whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    folder = crashed(asked(model, tmp_path / "outputs", method), at_step(step))
    resume(folder)
    assert story(folder) == whole(method)


def is_saved(name: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Saved) and event.folder == name


@pytest.mark.parametrize(
    "when",
    [
        pytest.param(lambda event: isinstance(event, Sampled), id="first sample"),
        pytest.param(lambda event: isinstance(event, Evaluated) and event.step == 8, id="evaluation"),
        pytest.param(is_saved("checkpoint-6"), id="checkpoint"),
        pytest.param(is_saved("checkpoint-12"), id="last checkpoint"),
        pytest.param(lambda event: isinstance(event, Sampled) and event.step == 5, id="sample"),
        pytest.param(lambda event: isinstance(event, Sampled) and event.step % 5 > 0, id="last sample"),
    ],
)
def test_a_run_that_died_between_steps_goes_on_bit_for_bit(
    when: Callable[[Event], bool], model: Path, whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    folder = crashed(asked(model, tmp_path / "outputs"), when)
    resume(folder)
    assert story(folder) == whole("lora")


def test_answers_during_training_leave_no_trace_and_are_made_up_for(
    model: Path, whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """At steps 4 and 8, after an evaluation: without them the run is the same, and none is lost that was due."""
    often = {"evaluation__sample_steps": 4, "evaluation__prompts": ["Who?", "What did Lily see away?"]}
    reference = story(run(asked(model, tmp_path / "whole" / "outputs", **often)).folder)
    other = whole("lora")
    assert [step for step, prompt, _ in reference["answers"] if prompt == "Who?"][:3] == [0, 4, 8]
    assert all(reference[name] == other[name] for name in other if name not in ("answers", "checkpoint"))

    dead = crashed(
        asked(model, tmp_path / "dead" / "outputs", **often), lambda event: isinstance(event, Evaluated) and event.step == 8
    )
    resume(dead)
    assert story(dead) == reference

    def stop_after_evaluation(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(asked(model, tmp_path / "stopped" / "outputs", **often), stop_after_evaluation)
    stopped, heard = RunFolder(tmp_path / "stopped" / "outputs" / "run"), list[Event]()
    assert not any(isinstance(event, Sampled) and event.step == 8 for event in stopped.replay())
    resume(stopped, heard.append)
    assert [event.step for event in heard if isinstance(event, Sampled)][:2] == [8, 8]
    assert story(stopped) == reference


def test_fault_062_a_run_may_die_again_and_again(model: Path, whole: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    folder = crashed(asked(model, tmp_path / "outputs"), at_step(2))
    for step in (2, 4, 5, 11):
        with pytest.raises(Crash):
            resume(folder, crash_when(at_step(step)))
    resume(folder)
    assert story(folder) == whole("lora")


def test_fault_089_a_moved_run_goes_on(whole: Callable[[str], dict[str, Any]], broken_off: Any, tmp_path: Path) -> None:
    """A run is a folder: nothing in it says where it was."""
    folder = broken_off(tmp_path)
    resume(folder)
    assert story(folder) == whole("lora")


def test_rows_given_in_memory_are_kept_for_the_resume(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    stories = []
    for name, step in (("whole", None), ("dead", 7)):
        config = asked(model, tmp_path / name / "outputs", data__train_file=rows)
        if step is None:
            stories.append(story(run(config).folder))
        else:
            folder = crashed(config, at_step(step))
            resume(folder)
            stories.append(story(folder))
    assert stories[0] == stories[1]


def getting_worse(place: Path) -> dict[str, Any]:
    """Knobs of a run that learns some words and is measured by others: its first step stays the best."""
    other = place / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"{name}?", "response": "%XQ" * 25}) + "\n" for name in NAMES))
    knobs = {"learning_rate": 0.1, "early_stopping_patience": 2, "eval_steps": 1, "save_steps": 1, "warmup_steps": 0}
    return {f"training__{name}": value for name, value in knobs.items()} | {"data__eval_file": str(other)}


def test_fault_085_early_stopping_survives_a_crash(model: Path, tmp_path: Path) -> None:
    """Dying between the last evaluation and the end must not add a step."""
    knobs = getting_worse(tmp_path)
    reference = story(run(asked(model, tmp_path / "whole" / "outputs", **knobs)).folder)
    (last, reason), best = reference["finished"][0], [step for step, _, best in reference["evaluations"] if best][-1]
    assert reason == "no improvement"
    assert best < last < STEPS
    folder = crashed(asked(model, tmp_path / "dead" / "outputs", **knobs), is_saved(f"checkpoint-{last}"))
    resume(folder)
    assert story(folder) == reference
    kept = folder.path / f"checkpoint-{best}"
    assert digest(folder.final / "adapter_model.safetensors") == digest(kept / "adapter_model.safetensors")


def test_a_torn_last_line_of_the_log_spoils_nothing(
    whole: Callable[[str], dict[str, Any]], broken_off: Any, tmp_path: Path
) -> None:
    folder = broken_off(tmp_path)
    with open(folder.path / "events.jsonl", "a") as log:
        log.write('{"event": "Stepped", "time": 17')
    resume(folder)
    assert story(folder) == whole("lora")


def test_drafts_of_a_dead_process_are_cleared_away(broken_off: Any, tmp_path: Path) -> None:
    folder = broken_off(tmp_path)
    for name in (".tmp-checkpoint-12-99999999", ".trash-checkpoint-9-99999999"):
        (folder.path / name).mkdir()
        (folder.path / name / "optimizer.safetensors").write_bytes(b"half")
    resume(folder)
    assert [
        path.name for path in folder.path.iterdir() if path.name.startswith((".tmp", ".trash")) or path.suffix == ".part"
    ] == []


# --- damaged checkpoints -----------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    os.truncate(folder / "optimizer.safetensors", (folder / "optimizer.safetensors").stat().st_size // 2)


def flip(folder: Path) -> None:
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(content)


def lose(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def unsign(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def garble(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 40)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("harm", [cut, flip, lose, unsign, garble, empty])
def test_fault_090_a_damaged_checkpoint_is_passed_over_and_named(
    harm: Callable[[Path], None], whole: Callable[[str], dict[str, Any]], broken_off: Any, tmp_path: Path
) -> None:
    folder, heard = broken_off(tmp_path), []
    newest, before = folder.checkpoints()[:2]
    harm(newest)
    assert damage(newest)
    resume(folder, heard.append)
    assert [event.checkpoint for event in heard if isinstance(event, Resumed)] == [before.name]
    warnings = [event.message for event in heard if isinstance(event, Warned) and newest.name in event.message]
    assert len(warnings) == 1
    assert "passed over" in warnings[0]
    assert story(folder) == whole("lora")


def test_fault_091_without_a_sound_checkpoint_nothing_is_made_up(broken_off: Any, tmp_path: Path) -> None:
    folder = broken_off(tmp_path)
    for checkpoint in folder.checkpoints():
        cut(checkpoint)
    with pytest.raises(ModelError, match="no sound checkpoint") as caught:
        resume(folder)
    assert caught.value.exit_code == 4


def test_a_damaged_checkpoint_never_costs_a_sound_one(model: Path, tmp_path: Path) -> None:
    """With a limit of one, rotation must not keep the newer but broken folder and remove the good one."""
    knobs = {"training__save_total_limit": 1, "data__validation_split": 0.0, "training__save_steps": 5}
    folder = crashed(asked(model, tmp_path / "outputs", **knobs), at_step(11))
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-10"]
    shutil.copytree(folder.path / "checkpoint-10", folder.path / "checkpoint-12")
    cut(folder.path / "checkpoint-12")

    def ask_to_stop(event: Event) -> None:
        if isinstance(event, Stepped):
            os.kill(os.getpid(), signal.SIGTERM)  # heard by the run: it saves this step and stops

    with pytest.raises(KitError) as caught:
        resume(folder, ask_to_stop)
    assert caught.value.exit_code == 143
    assert [path.name for path in folder.checkpoints() if damage(path) is None] == ["checkpoint-11"]
    resume(folder)
    assert folder.finished


def test_a_damaged_best_checkpoint_is_never_taken_for_the_result(model: Path, tmp_path: Path) -> None:
    knobs = getting_worse(tmp_path) | {"training__early_stopping_patience": 100}
    folder, heard = crashed(asked(model, tmp_path / "outputs", **knobs), at_step(11)), []
    best = [event.step for event in folder.replay() if isinstance(event, Evaluated) and event.best][-1]
    assert best < 9
    flip(folder.path / f"checkpoint-{best}")
    resume(folder, heard.append)
    assert [event for event in heard if isinstance(event, Warned) and "best" in event.message]
    assert json.loads((folder.final / MANIFEST).read_text())["step"] == STEPS
    newest = folder.path / f"checkpoint-{STEPS}"
    assert digest(folder.final / "adapter_model.safetensors") == digest(newest / "adapter_model.safetensors")


# --- what may not go on ------------------------------------------------------------------------------------


def appended(path: Path) -> None:
    path.write_text(path.read_text() + '{"prompt": "one", "response": "more"}\n')


def shortened(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def one_letter(path: Path) -> None:
    path.write_text(path.read_text().replace("Lily", "Lila", 1))


@pytest.mark.parametrize("change", [appended, shortened, one_letter])
def test_fault_029_a_run_whose_data_changed_does_not_go_on(change: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    folder = crashed(asked(model, tmp_path / "outputs"), at_step(4))
    before = contents(folder.path)
    change(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="has changed") as caught:
        resume(folder)
    assert caught.value.exit_code == 3
    assert contents(folder.path) == before


def test_a_run_whose_data_is_gone_does_not_go_on(model: Path, tmp_path: Path) -> None:
    folder = crashed(asked(model, tmp_path / "outputs"), at_step(4))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError):
        resume(folder)


def test_fault_086_a_finished_run_is_left_as_it_is(model: Path, tmp_path: Path) -> None:
    folder = run(asked(model, tmp_path / "outputs")).folder
    before = contents(folder.path)
    with pytest.raises(UsageError, match="finished") as caught:
        resume(folder)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="finished"):
        resume(folder, max_steps=STEPS)
    with pytest.raises(UsageError, match="finished"):
        resume(folder, max_steps=STEPS - 5)
    assert contents(folder.path) == before


def test_a_second_run_of_the_same_name_takes_the_next(model: Path, tmp_path: Path) -> None:
    config = asked(model, tmp_path / "outputs", training__max_steps=1)
    first = run(config).folder
    before = contents(first.path)
    assert [run(config).folder.path.name for _ in range(2)] == ["run-2", "run-3"]
    assert contents(first.path) == before


def test_fault_094_a_run_that_is_at_work_is_busy(broken_off: Any, tmp_path: Path) -> None:
    folder = broken_off(tmp_path)
    before = contents(folder.path)
    with RunFolder(folder.path).locked(), pytest.raises(BusyError) as caught:
        resume(folder)
    assert caught.value.exit_code == 7
    assert str(os.getpid()) in caught.value.why
    assert socket.gethostname() in caught.value.why
    assert "since 20" in caught.value.why
    assert contents(folder.path) == before
    with folder.locked():  # and free again
        pass


# --- longer than planned -----------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_fault_087_a_run_can_be_made_longer(finished: bool, model: Path, broken_off: Any, tmp_path: Path) -> None:
    folder = run(asked(model, tmp_path / "outputs")).folder if finished else broken_off(tmp_path)
    resume(folder, max_steps=STEPS + 6)
    told = story(folder)
    assert [step for step, *_ in told["steps"]] == list(range(1, STEPS + 7))
    assert told["finished"][-1] == (STEPS + 6, "all steps done")
    manifest = json.loads((folder.final / MANIFEST).read_text())
    assert manifest["step"] in (STEPS + 6, *(step for step, _, best in told["evaluations"] if best))
    assert told["checkpoint"][0] == f"checkpoint-{STEPS + 6}"


def test_a_run_that_is_to_end_sooner_says_what_that_does(broken_off: Any, tmp_path: Path) -> None:
    folder, heard = broken_off(tmp_path), list[Event]()
    resume(folder, heard.append, max_steps=STEPS - 1)
    told = [event.message for event in heard if isinstance(event, Warned)]
    assert any(f"ends at step {STEPS - 1} from here on, not {STEPS}" in message for message in told)


def test_a_run_that_made_it_worse_says_so_without_a_comparison(tmp_path: Path) -> None:
    heard = list[Event]()
    rough = {
        "training__learning_rate": 0.9,
        "training__max_steps": 2,
        "training__eval_steps": 2,
        "training__tokens_per_pass": None,
    }
    config = asked(Path("demo"), tmp_path / "outputs", data__train_file="sample:chat", evaluation__compare=False, **rough)
    run(config, heard.append)
    assert any(isinstance(event, Warned) and "the tuned model is worse than the base" in event.message for event in heard)


def test_a_constant_schedule_made_longer_is_the_longer_run(model: Path, tmp_path: Path) -> None:
    knobs = {"training__schedule": "constant", "training__warmup_steps": 0}
    longer = story(run(asked(model, tmp_path / "long" / "outputs", training__max_steps=STEPS + 3, **knobs)).folder)
    folder = run(asked(model, tmp_path / "short" / "outputs", **knobs)).folder
    resume(folder, max_steps=STEPS + 3)
    now = story(folder)
    assert now["steps"] == longer["steps"]
    assert now["checkpoint"] == longer["checkpoint"]
    assert now["final"] == longer["final"]


def test_a_longer_run_that_died_knows_where_it_was_going(model: Path, tmp_path: Path) -> None:
    folder = run(asked(model, tmp_path / "outputs")).folder
    with pytest.raises(Crash):
        resume(folder, crash_when(at_step(STEPS + 4)), max_steps=STEPS + 6)
    assert not folder.finished
    resume(folder)
    assert folder.finished
    assert [step for step, *_ in story(folder)["steps"]] == list(range(1, STEPS + 7))


def test_a_run_that_stopped_early_trains_on_when_asked(model: Path, tmp_path: Path) -> None:
    folder = run(asked(model, tmp_path / "outputs", **getting_worse(tmp_path))).folder
    stopped = folder.step
    assert stopped < STEPS
    resume(folder, max_steps=STEPS + 6)
    assert folder.step > stopped + 1  # the patience begins anew


# --- faults of training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is infinite for the letter z and sound for all else."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("poisoned") / "model"))
    weights = load_file(folder / "model.safetensors")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for piece, index in vocabulary.items():
        if "z" in piece:
            weights["model.embed_tokens.weight"][index] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_fault_073_a_loss_that_is_not_finite_stops_before_the_weights_move(
    method: str, poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_finetune_kit.models.loading.check_finite", lambda path, stored: None)  # it would not even start
    write_rows(tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[20] = json.dumps({"prompt": "Was it a zebra?", "response": "It was a cat."})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    knobs = {"data__validation_split": 0.0, "training__save_steps": 1}
    heard: list[Event] = []
    with pytest.raises(TrainingError) as caught:
        run(asked(poisoned, tmp_path / "outputs", method, **knobs), heard.append)
    error, folder = caught.value, RunFolder(tmp_path / "outputs" / "run")
    steps = [event.step for event in heard if isinstance(event, Stepped)]
    assert error.exit_code == 6
    assert "nan" in error.problem
    assert f"step {steps[-1] + 1}" in error.problem
    assert error.where == f"{tmp_path / 'rows.jsonl'} line 21"
    assert [event.code for event in heard if isinstance(event, Failed)] == [error.code]
    assert all(torch.isfinite(torch.tensor(event.loss)) for event in heard if isinstance(event, Stepped))
    newest = folder.checkpoints()[0]
    assert newest.name == f"checkpoint-{steps[-1]}"
    assert damage(newest) is None
    weights = load_file(newest / ("adapter_model.safetensors" if method == "lora" else "model.safetensors"))
    for name, tensor in weights.items():
        assert not tensor.isnan().any(), name
    assert not folder.finished


# --- killed from outside -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("cache"))
    yield nursery
    nursery.close()


LONG = 60  # steps: enough for a signal to find it at work


def command(model: Path, outputs: Path, method: str) -> list[str]:
    config = asked(model, outputs, method, training__max_steps=LONG, training__eval_steps=10)
    words = [f"{name}={value}" for name, value in flat(config.asked()).items()]
    return ["train", *words]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def wait_for_step(folder: RunFolder, step: int) -> None:
    """Until the log shows a step as late as this."""
    log, until = folder.path / "events.jsonl", time.monotonic() + 180
    while time.monotonic() < until:
        told = log.read_text() if log.exists() else ""
        if any(int(found) >= step for found in re.findall(r'^{"event": "Stepped",.*?"step": (\d+)', told, re.MULTILINE)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come")


@pytest.fixture(scope="module")
def whole_process(nursery: Nursery, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    @functools.cache
    def told(method: str) -> dict[str, Any]:
        place = tmp_path_factory.mktemp(f"process-{method}")
        nursery.start(*command(model, place / "outputs", method), output=place / "said")
        assert nursery.end() == 0, (place / "said").read_text()
        return story(RunFolder(place / "outputs" / "run"))

    return told


@pytest.mark.parametrize("method", METHODS)
def test_fault_059_killed_three_times_at_random_the_run_ends_the_same(
    method: str, nursery: Nursery, model: Path, whole_process: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**9))
    print(f"KILL_SEED={seed}")  # shown where the test fails: set it in the environment to see the same moments again
    chance = random.Random(seed)
    reference = whole_process(method)
    folder, words = RunFolder(tmp_path / "outputs" / "run"), command(model, tmp_path / "outputs", method)
    for _ in range(3):
        child = nursery.start(*words, output=tmp_path / "said")
        wait_for_step(folder, folder.step + chance.randint(1, 6))
        time.sleep(chance.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert nursery.end() == -signal.SIGKILL, (tmp_path / "said").read_text()
        assert not folder.finished
        words = ["resume", str(folder.path)]
    nursery.start(*words, output=tmp_path / "said")
    assert nursery.end() == 0, (tmp_path / "said").read_text()
    assert story(folder) == reference


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault_063_064_a_stopped_run_saves_says_how_to_go_on_and_does(
    number: signal.Signals,
    code: int,
    nursery: Nursery,
    model: Path,
    whole_process: Callable[[str], dict[str, Any]],
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "outputs" / "run")
    child = nursery.start(*command(model, tmp_path / "outputs", "lora"), output=tmp_path / "said")
    wait_for_step(folder, 5)
    began = time.monotonic()
    os.kill(child, number)
    assert nursery.end() == code
    assert time.monotonic() - began < 30
    newest = folder.checkpoints()[0]
    assert newest.name == f"checkpoint-{folder.step}"
    assert damage(newest) is None
    assert f"finetune resume {folder.path}" in (tmp_path / "said").read_text()
    assert [event.resume for event in folder.replay() if isinstance(event, Failed)] == ["finetune resume run"]
    nursery.start("resume", str(folder.path), output=tmp_path / "said")
    assert nursery.end() == 0
    assert story(folder) == whole_process("lora")


def test_fault_094_a_busy_run_exits_with_7_in_the_terminal(nursery: Nursery, broken_off: Any, tmp_path: Path) -> None:
    folder = broken_off(tmp_path)
    with folder.locked():
        nursery.start("resume", str(folder.path), output=tmp_path / "busy")
        assert nursery.end() == 7
    assert "BUSY-001" in (tmp_path / "busy").read_text()
