"""FAULTS 59 to 99: a part of the campaign, and what goes wrong around a training run, one by one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import campaign as trials
from campaign import Campaign
from faces import finetune, start
from llm_finetune_kit import files
from llm_finetune_kit.cli_runs import resume_command, runs_command
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import BusyError, ConfigError, Interrupted, KitError, MachineError, ModelError, TrainingError
from llm_finetune_kit.events import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Noted,
    Resumed,
    Sampled,
    Saved,
    Saving,
    Stage,
    Stepped,
    Warned,
)
from llm_finetune_kit.files import damage, fault_from, write_json
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.run import resume, run
from llm_finetune_kit.runs import find_run, runs, standing
from llm_finetune_kit.settings import changed, load_config
from llm_finetune_kit.training import saving
from llm_finetune_kit.training.step import Objective
from nursery import Nursery
from runs_to_kill import KINDS, command, make_material
from story import story

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_fault_is_left() -> Iterator[None]:
    yield
    files.armed = None


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    place = tmp_path_factory.mktemp("campaign")
    make_material(place)
    found = Campaign(place, 0, Nursery(place / "cache"))
    yield found
    found.nursery.close()


def seed() -> int:
    """A new one each time, shown where a test fails; set KILL_SEED to see the same moments again."""
    number = int(os.environ.get("KILL_SEED", time.time_ns() % 10**9))
    print(f"KILL_SEED={number}")
    return number


# --- the campaign, in small (benchmarks/survival has all of it) ---------------------------------------------


def test_fault_059_082_085_093_runs_of_every_kind_killed_at_random_end_the_same(at: Campaign, tmp_path: Path) -> None:
    """Accumulation with an incomplete group, streaming, early stopping, LoRA, DoRA, full and quantized."""
    trials.kills(at, random.Random(seed()), 10, tmp_path / "out.json")
    assert at.lost == []
    assert json.loads((tmp_path / "out.json").read_text())["kills"]["kills"] >= 10


def test_fault_063_sigterm_at_random_moments_loses_no_step(at: Campaign, tmp_path: Path) -> None:
    trials.stops(at, random.Random(seed()), 5, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["stops"]
    assert (at.lost, found["steps_lost"], found["wrong_exit_codes"]) == ([], 0, {})
    assert found["slowest_seconds"] < 10 + max(at.seconds.values())  # which a busy machine makes longer too


def test_fault_060_061_a_fault_at_any_step_on_the_disk_leaves_old_or_new(at: Campaign, tmp_path: Path) -> None:
    """One save in a hundred of the run's: rotation, the best copy and the final folder are among them."""
    trials.points(at, "early", ["kill", "ENOSPC", "EIO"], 29, tmp_path / "out.json")
    assert at.lost == []


def test_fault_090_damage_of_every_sort_is_noticed(at: Campaign, tmp_path: Path) -> None:
    trials.damages(at, random.Random(seed()), 100, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["damages"]
    assert (at.lost, found["unnoticed"], found["damages"]) == ([], [], 100)


# --- one by one --------------------------------------------------------------------------------------------


def asked(at: Campaign, place: Path, kind: str = "lora", **more: Any) -> RunConfig:
    config, _ = load_config(None, command(at.place, kind, place / "outputs")[1:])
    return changed(config, {name.replace("__", "."): value for name, value in more.items()})


def folder_of(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.output.output_dir) / str(config.output.run_name))


class Crash(Exception):
    """Stands for a process that dies: nothing after it is done."""


def at_step(number: int, act: Callable[[], None]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == number:
            act()

    return listen


def crash() -> None:
    raise Crash


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crashed(config: RunConfig, step: int) -> RunFolder:
    with pytest.raises(Crash):
        run(config, at_step(step, crash))
    return folder_of(config)


def test_fault_064_a_second_sigint_stops_at_once_and_harms_nothing(at: Campaign, tmp_path: Path) -> None:
    config = asked(at, tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        run(config, at_step(5, twice))
    assert caught.value.exit_code == 130
    folder = folder_of(config)
    assert {path.name for path in folder.checkpoints()} <= {"checkpoint-3", "checkpoint-4"}
    resume(folder)
    assert story(folder) == at.reference("lora")


@pytest.mark.parametrize(
    "when",
    [
        pytest.param(lambda event: isinstance(event, Stage) and event.name == "data", id="reading"),
        pytest.param(lambda event: isinstance(event, Stage) and event.name == "plan", id="planning"),
        pytest.param(lambda event: isinstance(event, Stage) and event.name == "model", id="loading"),
        pytest.param(lambda event: isinstance(event, Evaluated) and event.step == 0, id="first evaluation"),
        pytest.param(lambda event: isinstance(event, Stepped) and event.step == 8, id="evaluation"),
        pytest.param(lambda event: isinstance(event, Saving) and event.step == 6, id="saving"),
        pytest.param(lambda event: isinstance(event, Sampled) and event.step == 5, id="sample"),
        pytest.param(lambda event: isinstance(event, Sampled) and event.step % 5 > 0, id="end"),
    ],
)
def test_fault_065_sigterm_in_any_stage_leaves_nothing_half_done(
    when: Callable[[Event], bool], at: Campaign, tmp_path: Path
) -> None:
    config, sent = asked(at, tmp_path), []

    def listen(event: Event) -> None:
        if when(event) and not sent:
            sent.append(event)
            stop()

    with pytest.raises(Interrupted) as caught:
        run(config, listen)
    assert caught.value.exit_code == 143
    folder = folder_of(config)
    if not folder.path.is_dir():
        assert not Path(config.output.output_dir).exists() or not any(Path(config.output.output_dir).iterdir())
        return
    assert not [path for path in folder.path.iterdir() if path.name.startswith((".tmp", ".old", ".trash"))]
    assert all(damage(path) is None for path in folder.checkpoints())
    assert f"finetune resume {folder.path}" in caught.value.fix
    reached = max((event.step for event in folder.replay() if isinstance(event, Stepped)), default=0)
    assert not reached or folder.checkpoints()[0].name == f"checkpoint-{reached}"
    heard: list[Event] = []
    resume(folder, heard.append)
    assert [event.step for event in heard if isinstance(event, Evaluated) and event.step == reached] == (
        [reached] if reached in (0, 8) else []
    )  # the evaluation that was left is made up for
    assert story(folder) == at.reference("lora")


def test_fault_067_a_run_that_was_suspended_goes_on(at: Campaign) -> None:
    reference = at.reference("lora")
    at.fresh()
    child = at.start(command(at.place, "lora", at.outputs))
    while not [event for event in at.folder.replay() if isinstance(event, Stepped)]:
        time.sleep(0.002)
    os.kill(child, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child, signal.SIGCONT)
    assert at.nursery.end() == 0
    assert story(at.folder) == reference


def test_fault_068_a_full_disk_stops_the_run_with_what_it_had(at: Campaign, tmp_path: Path) -> None:
    config, heard = asked(at, tmp_path, training__on_disk_full="stop"), []

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, Saved) and event.step == 4:
            files.armed = fault_from("write:2+:ENOSPC")

    with pytest.raises(MachineError, match=r"checkpoint-6 cannot be written: No space left on device, .* MB are free") as caught:
        run(config, listen)
    assert caught.value.exit_code == 5
    assert "checkpoint-4 is the last" in caught.value.why
    assert "finetune resume" in caught.value.fix
    folder = folder_of(config)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-4", "checkpoint-3"]
    assert standing(folder).state == "failed"
    files.armed = None
    resume(folder)
    assert story(folder) == at.reference("lora")


def test_fault_068_at_a_terminal_the_run_waits_for_room_and_goes_on(
    at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "RETRY", 0.05)
    config, heard = asked(at, tmp_path, training__on_disk_full="pause"), []

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, Stepped) and event.step == 5:
            files.armed = fault_from("write:1+:ENOSPC")
        if isinstance(event, Warned) and "the run waits" in event.message:
            threading.Timer(0.3, lambda: setattr(files, "armed", None)).start()

    run(config, listen)
    assert [event.message for event in heard if isinstance(event, Noted) and "written now" in event.message]
    assert story(folder_of(config)) == at.reference("lora")


def test_fault_068_a_run_that_waits_for_room_can_be_stopped(
    at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "RETRY", 0.05)
    config = asked(at, tmp_path, training__on_disk_full="pause")

    def listen(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 4:
            files.armed = fault_from("write:1+:ENOSPC")
        if isinstance(event, Warned) and "the run waits" in event.message:
            threading.Timer(0.2, stop).start()

    with pytest.raises(MachineError) as caught:
        run(config, listen)
    assert caught.value.exit_code == 5
    files.armed = None
    resume(folder_of(config))
    assert story(folder_of(config)) == at.reference("lora")


def test_fault_068_070_on_a_really_full_disk(at: Campaign, tmp_path: Path) -> None:
    """A file system of 3 MB: too little for the plan, and forced, for the third checkpoint; then it grows."""
    (tmp_path / "disk").mkdir()
    words = " ".join(f"'{word}'" for word in command(at.place, "full", Path("disk")))
    tool = f"{sys.executable} -m llm_finetune_kit"
    script = (
        f"mount -t tmpfs -o size=3500k tmpfs disk && {tool} {words}; echo first=$?; ls disk; "
        f"{tool} {words} --force; echo second=$?; ls disk/run; "
        f"mount -o remount,size=100m disk && {tool} resume disk/run; echo third=$?; cp disk/run/events.jsonl ."
    )
    if not shutil.which("unshare") or start(["unshare", "-m", "true"], tmp_path).code:
        pytest.skip("mounts cannot be unshared here")
    done = start(["unshare", "-m", "sh", "-c", script], tmp_path)
    said = done.out.split("\n")
    assert "first=5" in said and said[said.index("first=5") + 1 :][0].startswith("second") is False
    assert "MB of disk" in done.err and "one being written" in done.err
    assert "second=5" in said and "No space left on device" in done.err
    assert "third=0" in said
    assert '"event": "Finished"' in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize("fault", ["write:2:EFBIG", "sync:3:EIO", "rename:3:ENOSPC", "make:1:EROFS", "sync:1:EDQUOT"])
def test_fault_069_whatever_the_disk_answers_is_told_and_nothing_is_lost(fault: str, at: Campaign, tmp_path: Path) -> None:
    config = asked(at, tmp_path, training__on_disk_full="stop")

    def arm(event: Event) -> None:
        if isinstance(event, Saving) and event.step == 6:  # the checkpoint before it is whole by now
            files.armed = fault_from(fault)

    with pytest.raises(MachineError, match="checkpoint-6 cannot be written") as caught:
        run(config, arm)
    assert caught.value.exit_code == 5
    files.armed = None
    folder = folder_of(config)
    assert all(damage(path) is None for path in folder.checkpoints())
    resume(folder)
    assert story(folder) == at.reference("lora")


def test_fault_069_a_disk_that_fails_before_the_first_step_is_told_as_such(at: Campaign, tmp_path: Path) -> None:
    config = asked(at, tmp_path)

    def arm(event: Event) -> None:
        if isinstance(event, Noted) and "are trained on" in event.message:
            files.armed = fault_from("sync:2:EIO")

    with pytest.raises(MachineError, match="cannot be read or written: Input/output error") as caught:
        run(config, arm)
    assert caught.value.exit_code == 5


def test_fault_071_a_log_that_cannot_be_written_costs_one_warning(at: Campaign, tmp_path: Path) -> None:
    config, heard = asked(at, tmp_path), []

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, Stepped) and event.step == 2:
            files.armed = fault_from("log:1+:ENOSPC")

    result = run(config, listen)
    warned = [event.message for event in heard if isinstance(event, Warned)]
    assert len([message for message in warned if "events.jsonl" in message]) == 1
    reference = at.reference("lora")
    files.armed = None
    assert isinstance(heard[-1], Finished)
    assert damage(result.folder.final) is None
    resume(result.folder)  # its end is not in the log, so it comes to it again
    assert story(result.folder)["final"] == reference["final"]


@pytest.mark.parametrize("waits", [True, False])
def test_fault_072_a_run_folder_that_is_gone_is_named_and_waited_for(
    waits: bool, at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "RETRY", 0.05)
    config = asked(at, tmp_path, training__on_disk_full="pause" if waits else "stop")
    folder = folder_of(config)
    away = tmp_path / "away"

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            folder.path.rename(away)
        if isinstance(event, Warned) and "the run waits" in event.message:
            away.rename(folder.path)

    if waits:
        run(config, listen)
    else:
        with pytest.raises(MachineError, match="No such file") as caught:
            run(config, listen)
        assert str(folder.path) in caught.value.where
        away.rename(folder.path)
        resume(folder)
    assert story(folder) == at.reference("lora")


# --- training goes wrong -----------------------------------------------------------------------------------


def test_fault_074_a_step_with_nothing_to_learn_is_left_out_and_told(at: Campaign, tmp_path: Path) -> None:
    from llm_finetune_kit.data.masks import Tokens
    from llm_finetune_kit.training.checkpoint import Progress
    from llm_finetune_kit.training.loop import Schedule, fit

    config = asked(at, tmp_path)
    result = run(config)
    import numpy as np

    lengths = np.arange(0, 44, 4)
    tokens = Tokens(np.full(40, 7, np.int32), np.zeros(40, bool), lengths, np.arange(10, dtype=np.int32))
    heard: list[Event] = []
    optimizer = torch.optim.SGD([part for part in result.model.parameters() if part.requires_grad], lr=0.0)
    schedule = Schedule([1e-3] * 2, 4, 100, True, 1.0, 10, 10, None, 1)
    with pytest.raises(TrainingError, match="trained nothing") as caught:
        fit(result.objective, optimizer, tokens, None, schedule, Progress(), lambda _: None, heard.append)
    assert caught.value.exit_code == 6
    assert not [event for event in heard if isinstance(event, Stepped)]
    assert len([event for event in heard if isinstance(event, Warned) and "left out" in event.message]) == 2


def test_fault_075_a_loss_spike_is_told(at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_finetune_kit.training import loop

    plain, heard = loop.accumulate, []

    def spiked(*given: Any) -> torch.Tensor:
        after_4 = any(isinstance(event, Stepped) and event.step == 4 for event in heard)
        return plain(*given) * (100 if after_4 else 1)

    monkeypatch.setattr(loop, "accumulate", spiked)
    run(asked(at, tmp_path, training__max_steps=5), heard.append)
    assert [event.message for event in heard if isinstance(event, Warned) and "the loss of step 5 is" in event.message]


def test_fault_075_a_run_whose_gradients_are_zero_never_ends_well(at: Campaign, tmp_path: Path, monkeypatch: Any) -> None:
    from llm_finetune_kit.training import loop

    def nothing(objective: Any, passes: Any, scale: float = 1.0) -> torch.Tensor:
        for part in objective.model.parameters():
            part.grad = torch.zeros_like(part) if part.requires_grad else None
        return torch.tensor(1.0)

    monkeypatch.setattr(loop, "accumulate", nothing)
    heard: list[Event] = []
    with pytest.raises(TrainingError, match="trained nothing") as caught:
        run(asked(at, tmp_path), heard.append)
    assert caught.value.exit_code == 6
    assert len([event for event in heard if isinstance(event, Warned) and "is zero" in event.message]) == 1
    assert not folder_of(asked(at, tmp_path)).finished


def test_fault_075_a_model_with_nothing_to_train_is_refused(at: Campaign, tmp_path: Path) -> None:
    with pytest.raises(KitError) as caught:
        run(asked(at, tmp_path, "full", training__freeze_layers=3))
    assert caught.value.exit_code == 2
    done = finetune(tmp_path, *command(at.place, "full", tmp_path / "out"), "training.learning_rate=0", light=True)
    assert done.code == 2 and "above 0" in done.err


def scarce(limit: int, step: int, monkeypatch: pytest.MonkeyPatch, at_evaluation: bool = False) -> None:
    """A machine whose memory runs out in passes of more than `limit` tokens."""
    plain = Objective.summed

    def summed(self: Objective, work: Any, scale: float = 1.0) -> torch.Tensor:
        loss = plain(self, work, scale)
        if work.tokens > limit and self.model.training != at_evaluation:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(Objective, "summed", summed)


def but_first_evaluation(folder: RunFolder) -> dict[str, Any]:
    """That one came before memory ran out."""
    told = story(folder)
    return told | {"evaluations": told["evaluations"][1:]}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fault_076_where_memory_runs_out_the_step_is_done_again_in_smaller_passes(
    kind: str, at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout too: the result is that of a run that had been started with the smaller budget."""
    small = run(asked(at, tmp_path / "small", kind, training__tokens_per_pass=64)).folder
    scarce(64, 1, monkeypatch)
    heard: list[Event] = []
    big = run(asked(at, tmp_path / "big", kind, training__tokens_per_pass=128), heard.append).folder
    assert len([event for event in heard if isinstance(event, Warned) and "memory ran out in step 1" in event.message]) == 1
    assert but_first_evaluation(big) == but_first_evaluation(small)
    assert json.loads((big.checkpoints()[0] / "trainer_state.json").read_text())["tokens_per_pass"] == 64


def test_fault_076_a_resumed_run_remembers_how_much_fits(at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = run(asked(at, tmp_path / "small", training__tokens_per_pass=64)).folder
    scarce(64, 1, monkeypatch)
    folder = crashed(asked(at, tmp_path / "big", training__tokens_per_pass=128), 7)
    heard: list[Event] = []
    resume(folder, heard.append)
    assert not [event for event in heard if isinstance(event, Warned) and "memory ran out" in event.message]
    assert but_first_evaluation(folder) == but_first_evaluation(small)


def test_fault_076_an_evaluation_that_does_not_fit_is_done_in_smaller_passes(
    at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce(64, 1, monkeypatch, at_evaluation=True)
    heard: list[Event] = []
    run(asked(at, tmp_path), heard.append)
    assert [event for event in heard if isinstance(event, Warned) and "memory ran out in the evaluation" in event.message]
    assert [event.step for event in heard if isinstance(event, Evaluated)] == [0, 4, 8, 12]


def test_fault_076_a_row_that_does_not_fit_is_named(at: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce(8, 1, monkeypatch)
    with pytest.raises(TrainingError, match="memory does not suffice for one row of") as caught:
        run(asked(at, tmp_path))
    assert caught.value.exit_code == 6
    assert "rows.jsonl line" in caught.value.where
    assert "training.gradient_checkpointing=true" in caught.value.fix


def test_fault_076_memory_that_really_runs_out(at: Campaign, tmp_path: Path) -> None:
    """An address space that holds the model but not a pass of 4,096 tokens: the run ends well, in smaller ones."""
    rows = [{"prompt": "Tell!", "response": " ".join(f"word {number * row}" for number in range(30))} for row in range(640)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = {
        "data.train_file": str(tmp_path / "long.jsonl"),
        "training.tokens_per_pass": "131072",
        "training.batch_size": "500",
        "training.gradient_accumulation_steps": "1",
        "training.max_steps": "2",
        "model.dtype": "float32",  # oneDNN, which computes bfloat16, makes no kernels any more after it failed to place one
    }
    words = [word for word in command(at.place, "lora", tmp_path / "outputs") if word.partition("=")[0] not in other]
    words += [f"{name}={value}" for name, value in other.items()]
    limit = (
        "import resource, sys, threading\n"
        "from llm_finetune_kit import cli, events, terminal\n"
        "plain = terminal.Terminal.__call__\n"
        "def heard(self, event):\n"
        "    if isinstance(event, events.Stage) and event.name == 'train':\n"
        "        used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))\n"
        "    if isinstance(event, events.Stepped):\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n"
        "    plain(self, event)\n"
        "terminal.Terminal.__call__ = heard\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = start([sys.executable, "-c", limit, *words], tmp_path)
    assert "memory ran out in step 1" in done.err, done.err
    assert done.code == 0, done.err


def test_fault_078_a_step_is_the_same_however_it_is_split(at: Campaign, tmp_path: Path) -> None:
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 rows of unequal lengths: the same losses, and the same update."""
    told = []
    for batch in (1, 2, 4, 8):
        knobs = {"training__batch_size": batch, "training__gradient_accumulation_steps": 8 // batch, "training__max_steps": 3}
        told.append(story(run(asked(at, tmp_path / str(batch), "dora", **knobs)).folder))
    assert told[0] == told[1] == told[2] == told[3]
    assert len({step[4] for step in told[0]["steps"]}) > 1, "the steps differ in length"


# --- order, change and age ---------------------------------------------------------------------------------


def test_fault_079_the_order_of_checkpoints_is_that_of_their_steps(at: Campaign, tmp_path: Path) -> None:
    folder = crashed(asked(at, tmp_path), 11)
    for age, path in enumerate(folder.checkpoints()):
        os.utime(path, (10**9 + age, 10**9 + age))  # the older the step, the younger the folder
    heard: list[Event] = []
    resume(folder, heard.append)
    assert [event.step for event in heard if isinstance(event, Resumed)] == [9]
    assert story(folder) == at.reference("lora")


def test_fault_080_081_a_run_that_dies_after_every_step_ends_the_same(at: Campaign, tmp_path: Path) -> None:
    folder = crashed(asked(at, tmp_path, training__save_steps=1, training__save_total_limit=2), 1)
    for step in range(2, 13):
        with pytest.raises(Crash):
            resume(folder, at_step(step, crash))
    resume(folder)
    assert story(folder) == at.reference("lora")


@pytest.mark.parametrize("knobs", [{"schedule": "constant"}, {"schedule": "linear"}, {"packing": False}, {"warmup_steps": 6}])
def test_fault_084_085_schedules_and_packing_survive(knobs: dict[str, Any], at: Campaign, tmp_path: Path) -> None:
    knobs = {f"training__{name}": value for name, value in knobs.items()}
    whole = story(run(asked(at, tmp_path / "whole", **knobs)).folder)
    folder = crashed(asked(at, tmp_path / "dead", **knobs), 7)
    resume(folder)
    assert story(folder) == whole
    assert whole["steps"] != at.reference("lora")["steps"]


def test_fault_088_changes_that_make_another_run_are_refused_with_a_table(at: Campaign, tmp_path: Path) -> None:
    folder = crashed(asked(at, tmp_path), 7)
    with pytest.raises(ConfigError) as caught:
        resume(folder, changes=["training.batch_size=8", "lora.r=4", "training.seed=1"], allow_change=True)
    assert caught.value.exit_code == 2
    for words in ("began with", "training.batch_size", "2", "8", "lora.r", "training.seed", "42"):
        assert words in caught.value.why
    with pytest.raises(ConfigError, match="another run") as caught:
        resume(folder, changes=["training.learning_rate=0.001"])
    assert "--allow-change" in caught.value.fix
    heard: list[Event] = []
    resume(folder, heard.append, changes=["training.learning_rate=0.001", "training.save_steps=5"], allow_change=True)
    assert len([event for event in heard if isinstance(event, Noted) and "from here on" in event.message]) == 2
    rates = {event.step: event.learning_rate for event in folder.replay() if isinstance(event, Stepped)}
    reference = {step: float.fromhex(rate) for step, _, _, rate, _ in at.reference("lora")["steps"]}
    assert rates[6] == reference[6] and rates[9] == pytest.approx(reference[9] / 3)


def test_fault_088_mechanics_may_change_and_the_steps_stay(at: Campaign, tmp_path: Path) -> None:
    folder = crashed(asked(at, tmp_path), 7)
    resume(folder, changes=["training.save_steps=1", "training.logging_steps=4", "training.save_total_limit=9"])
    assert story(folder)["steps"] == at.reference("lora")["steps"]
    assert folder.checkpoints()[2].name == "checkpoint-10"


def test_fault_088_a_base_model_that_changed_is_refused(at: Campaign, tmp_path: Path) -> None:
    model = shutil.copytree(at.place / "model", tmp_path / "model")
    folder = crashed(asked(at, tmp_path, model__name=str(model)), 7)
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-40] ^= 1
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="base model has changed") as caught:
        resume(folder)
    assert caught.value.exit_code == 4


def test_other_versions_are_told_when_a_run_goes_on(at: Campaign, tmp_path: Path) -> None:
    folder = crashed(asked(at, tmp_path), 7)
    resolved = json.loads((folder.path / "resolved.json").read_text())
    resolved["versions"]["torch"] = "2.1.0"
    write_json(folder.path / "resolved.json", resolved)
    heard: list[Event] = []
    resume(folder, heard.append)
    assert [event for event in heard if isinstance(event, Warned) and "torch 2.1.0 (now" in event.message]


def test_fault_092_a_checkpoint_of_an_earlier_format_says_what_reads_it(at: Campaign, tmp_path: Path) -> None:
    folder = crashed(asked(at, tmp_path), 4)
    for path in folder.checkpoints():
        state = json.loads((path / "trainer_state.json").read_text()) | {"format": 1}
        manifest = json.loads((path / "manifest.json").read_text())
        facts = {name: value for name, value in manifest.items() if name not in ("files", "seal")}
        facts["versions"]["llm-finetune-kit"] = "0.0.9"
        beside = tmp_path / "copy"
        shutil.copytree(path, beside)

        def write(draft: Path, beside: Path = beside, state: Any = state) -> None:
            for file in beside.iterdir():
                if file.name != "manifest.json":
                    shutil.copy(file, draft)
            write_json(draft / "trainer_state.json", state)

        files.commit(path, write, facts)
        shutil.rmtree(beside)
    with pytest.raises(ModelError, match="format 1, and this version reads format 2") as caught:
        resume(folder)
    assert "llm-finetune-kit 0.0.9" in caught.value.fix
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("seal")
    write_json(path / "manifest.json", manifest)
    assert "earlier version" in str(damage(path))


# --- several at once ---------------------------------------------------------------------------------------


def test_fault_095_after_a_kill_the_next_start_works_at_once(at: Campaign) -> None:
    at.reference("lora")
    at.fresh()
    child = at.start(command(at.place, "lora", at.outputs))
    while not (at.folder.path / "resolved.json").is_file():
        time.sleep(0.01)
    assert at.folder.at_work and standing(at.folder).state == "running"
    with pytest.raises(BusyError, match="every unfinished run is at work"):
        find_run(None, at.outputs)
    os.kill(child, signal.SIGKILL)
    at.nursery.end()
    assert not at.folder.at_work and standing(at.folder).state == "interrupted"
    assert at.run(["resume", str(at.folder.path)]) == 0


def test_fault_097_of_five_starts_one_works_and_four_are_busy(at: Campaign, tmp_path: Path) -> None:
    """As pressing a button five times does: the same run is asked to go on."""
    folder = crashed(asked(at, tmp_path), 7)
    codes: list[int] = []

    def again(event: Event) -> None:
        if isinstance(event, Stage) and event.name == "model":
            for _ in range(4):
                with pytest.raises(BusyError) as caught:
                    resume_command([str(folder.path)])
                codes.append(caught.value.exit_code)

    resume(folder, again)
    assert codes == [7] * 4
    assert story(folder) == at.reference("lora")


def test_fault_098_a_run_at_work_is_not_removed_and_is_read_consistently(at: Campaign, tmp_path: Path) -> None:
    folder, codes = folder_of(asked(at, tmp_path)), []
    at.said.write_text("")

    def meddle(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 8:
            with pytest.raises(BusyError) as caught:
                runs_command(["rm", str(folder.path), "--yes"])
            codes.append(caught.value.exit_code)
            codes.append(at.run(["generate", str(folder.path), "--prompt", "Who?"]))  # from the newest whole checkpoint

    run(asked(at, tmp_path), meddle)
    assert codes == [7, 0], at.said.read_text()
    assert story(folder) == at.reference("lora")
    assert runs_command(["rm", str(folder.path), "--yes"]) == 0
    assert not folder.path.exists()


def test_fault_099_twenty_runs_are_listed_as_they_stand(at: Campaign, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left of a queue when its server is killed: finished runs, and others that can go on."""
    dead = crashed(asked(at, tmp_path, output__run_name="dead"), 7)
    done = run(asked(at, tmp_path, output__run_name="done")).folder
    outputs = dead.path.parent
    with (done.path / "events.jsonl").open("a") as log:  # a torn line of a process that was killed
        log.write('{"event": "Stepped"')
    for number in range(18):
        source = (dead, done)[number % 2].path
        shutil.copytree(source, outputs / f"{source.name}-{number + 2}")
    assert len(runs(outputs)) == 20
    assert runs_command(["--output-dir", str(outputs), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {(one["name"].partition("-")[0], one["state"]) for one in listed} == {("dead", "failed"), ("done", "finished")}
    assert runs_command(["show", "dead-2", "--output-dir", str(outputs)]) == 0
    assert "finetune resume" in capsys.readouterr().out
    assert find_run(None, outputs).path.name.startswith("dead")
    resume(RunFolder(outputs / "dead-2"))
    assert story(RunFolder(outputs / "dead-2")) == story(done) == at.reference("lora")


def test_a_killed_run_has_a_report(at: Campaign, tmp_path: Path) -> None:
    folder = crashed(asked(at, tmp_path), 7)
    assert "Will it fit?" in (folder.path / "report.html").read_text()
    assert [event.code for event in folder.replay() if isinstance(event, Failed)] == ["BUG-001"]


def test_kinds_of_the_campaign_differ(at: Campaign) -> None:
    """Otherwise the campaign would prove one thing six times."""
    assert len({json.dumps(at.reference(kind)["steps"]) for kind in KINDS}) == len(KINDS)


def test_unused_memory_is_given_back_where_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_finetune_kit.training import loop

    held, given_back, settled = iter([1000, 1050, 1099, 1101, 900, 980, 991]), [], 0
    monkeypatch.setattr(loop, "resident_memory", lambda: next(held))
    monkeypatch.setattr(loop, "release_memory", lambda: given_back.append(settled))
    story_of_it = [settled := loop._kept_small(settled) for _ in range(7)]
    assert story_of_it == [1000, 1000, 1000, 0, 900, 900, 0]
    assert given_back == [1000, 900]
