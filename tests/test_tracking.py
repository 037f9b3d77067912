"""Experiment trackers: what they are told, how a run goes on in them, and that nothing they do can harm the run.

wandb, trackio and mlflow are stand-ins with the same signatures (`standins/`); TensorBoard is the real package.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faces import FINETUNE, ROOT, finetune
from llm_finetune_kit import tracking
from llm_finetune_kit.cli import main
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import ConfigError, MachineError
from llm_finetune_kit.events import Evaluated, Event, Failed, Finished, Resumed, Sampled, Saved, Stepped, Warned
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.planning import plan_run
from llm_finetune_kit.run import resume, run
from llm_finetune_kit.settings import changed, load_config
from llm_finetune_kit.tracking import STATE, pipe, require_trackers, tracked
from llm_finetune_kit.tracking.pipe import Pipe
from llm_finetune_kit.tracking.records import Cleaner, hyperparameters, numbers
from test_machine_faults import unshared

STANDINS = Path(__file__).parent / "standins"
PRETENDED = ("wandb", "trackio", "mlflow")
ALL = ("tensorboard", *PRETENDED)
SECRET = "0123456789abcdef"  # of a token that no shape gives away


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins can be imported, here and in child processes, and write into this file."""
    path = tmp_path / "journal.jsonl"
    path.touch()
    monkeypatch.syspath_prepend(str(STANDINS))
    monkeypatch.setenv("TRACKER_JOURNAL", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "HF_TOKEN"))]:
        monkeypatch.delenv(name)
    return path


def calls(journal: Path, name: str) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return [call for call in told if call["call"].startswith(name)]


def asked(outputs: Path, *trackers: str, **more: Any) -> RunConfig:
    """Four quick steps of the embedded model."""
    values = {
        "model.name": "demo",
        "data.train_file": [{"prompt": f"Say {n}.", "response": f"It is {n}."} for n in range(24)],
        "data.validation_split": 0.2,
        "training.max_steps": 4,
        "training.batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.eval_steps": 2,
        "training.save_steps": 2,
        "training.trackers": list(trackers),
        "evaluation.generation.max_new_tokens": 3,
        "output.output_dir": str(outputs),
        "output.run_name": "run",
    }
    return changed(RunConfig(), values | {name.replace("__", "."): value for name, value in more.items()})


@pytest.fixture(scope="module")
def decided() -> RunConfig:
    """A decided config."""
    asked = {"model.name": "demo", "data.train_file": "sample:chat", "training.max_steps": 9}
    return plan_run(changed(RunConfig(), asked)).config


def stepped(step: int) -> Stepped:
    return Stepped(step, 9, step / 9, 2.0 - step / 10, 1e-3, 0.5, 100, 40, 0.5)


STORY = [
    Evaluated(0, 2.5, 12.2, 8, 90, 0.1),
    Sampled(0, "Who?", "Me & <you>", "Nobody"),
    *[stepped(step) for step in range(1, 10)],
    Evaluated(9, 1.0, 2.7, 8, 90, 0.1, True),
    Saved(9, "checkpoint-9", 1000, 0.1),
    Saved(9, "final", 900, 0.1),
    Finished(9, "all steps done", {"last_loss": 1.1, "note": "text", "measured": {"error": 0.5}}),
]


def told(
    folder: Path, config: RunConfig, *names: str, story: list[Event] | None = None, before_last: Callable[[], Any] = lambda: None
) -> list[Event]:
    """What the run says while a story is told to trackers; `before_last` is called before its last event."""
    folder.mkdir(exist_ok=True)
    heard: list[Event] = []
    *most, last = story or STORY
    with tracked(folder, config.with_values({"training.trackers": list(names)}), heard.append) as say:
        for event in most:
            say(event)
        before_last()
        say(last)
    return heard


# --- the knob ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("report_to: wandb", ["wandb"]),
        ("report_to: [tensorboard, mlflow, tensorboard]", ["tensorboard", "mlflow"]),
        ("report_to: none", []),
        ("report_to: []", []),
        ("training: {report_to: none}", []),
        ("training: {trackers: null}", []),
        ("training: {trackers: trackio}", ["trackio"]),
    ],
)
def test_trackers_are_named_as_other_tools_name_them(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "cfg.yaml").write_text(text)
    assert tracking.asked_trackers(load_config(tmp_path / "cfg.yaml")[0]) == names


@pytest.mark.parametrize("value", ["all", "neptune", "[wandb, all]"])
def test_all_and_unknown_trackers_are_refused_with_the_names(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"report_to={value}"])
    assert "tensorboard, wandb, trackio or mlflow" in caught.value.problem


def test_fault_135_a_missing_tracker_is_told_before_anything_is_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MachineError) as caught:
        run(asked(tmp_path / "out", "wandb", "mlflow", data__train_file="missing.jsonl"))
    assert caught.value.code == "MACHINE-070"
    assert caught.value.problem == "wandb and mlflow are not installed, to record the run there"
    assert "pip install 'llm-finetune-kit[tracking]'" in caught.value.fix
    assert not (tmp_path / "out").exists()
    require_trackers(asked(tmp_path))


def test_a_run_goes_on_where_its_tracker_is_missing(tmp_path: Path, decided: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    heard = told(tmp_path / "run", decided, "wandb")
    assert [event.message for event in heard if isinstance(event, Warned)] == [
        "the run is no longer recorded by wandb: it is not installed here"
    ]


# --- what is told ------------------------------------------------------------------------------------------


def test_events_are_numbers_under_stable_names() -> None:
    assert numbers(stepped(1)) == {
        "train/loss": 1.9,
        "train/learning_rate": 1e-3,
        "train/gradient_norm": 0.5,
        "train/epoch": 1 / 9,
        "train/tokens_per_second": 200.0,
    }
    assert numbers(STORY[0]) == {"eval/loss": 2.5, "eval/perplexity": 12.2}
    assert numbers(Saved(9, "checkpoint-9", 1000, 0.1)) == {"checkpoint/bytes": 1000, "checkpoint/seconds": 0.1}
    assert numbers(STORY[-1]) == {"final/last_loss": 1.1, "final/measured/error": 0.5}
    assert numbers(Warned("x")) == numbers(Saved(9, "final", 900, 0.1)) == {}


def test_hyperparameters_are_all_decided_values_and_say_which_were_asked(decided: RunConfig) -> None:
    found = hyperparameters(decided, {"model": {"name": "demo"}, "training": {"max_steps": 9}})
    assert found["asked"] == "model.name, training.max_steps"
    assert found["lora.r"] == 16 and found["training.max_steps"] == 9 and found["training.learning_rate"]
    assert not {"output.output_dir", "model.cache_dir", "training.trackers"} & set(found)
    secretive = {"model.name": "/home/somebody/models/mine", "data.train_file": [{"text": "x"}] * 3}
    found = hyperparameters(decided.with_values(secretive), {})
    assert (found["model.name"], found["data.train_file"]) == ("mine", "3 rows")


def of_trackers(heard: list[Event]) -> list[str]:
    """What was warned of, but for the answers of three tokens."""
    return [event.message for event in heard if isinstance(event, Warned) and "answers were cut" not in event.message]


def test_a_whole_run_is_recorded_by_every_tracker(tmp_path: Path, journal: Path) -> None:
    heard: list[Event] = []
    run(asked(tmp_path / "out", *PRETENDED), heard.append)
    folder = tmp_path / "out" / "run"
    assert of_trackers(heard) == []
    losses = {event.step: event.loss for event in heard if isinstance(event, Stepped)}
    batches = [row for call in calls(journal, "mlflow.log_batch") for row in call["metrics"]]
    assert {step: value for step, key, value in batches if key == "train/loss"} == losses
    logs = [call["data"] for call in calls(journal, "wandb.Run.log")]
    assert {log["step"]: log["train/loss"] for log in logs if "train/loss" in log} == losses
    logs = calls(journal, "trackio.Run.log")
    assert {log["step"]: log["metrics"]["train/loss"] for log in logs if "train/loss" in log["metrics"]} == losses
    held_out = {event.step: event.loss for event in heard if isinstance(event, Evaluated)}
    assert {step: value for step, key, value in batches if key == "eval/loss"} == held_out
    answers = [event.answer for event in heard if isinstance(event, Sampled)]
    assert answers[-1] in calls(journal, "mlflow.log_text")[-1]["text"]
    (begun,) = calls(journal, "wandb.init")
    assert begun["call"] == "wandb.init.offline" and begun["config"]["lora.r"] == 16
    (begun,) = calls(journal, "trackio.init")
    assert begun["config"]["training.max_steps"] == 4
    assert calls(journal, "wandb.Run.finish")[-1]["exit_code"] == 0
    assert calls(journal, "mlflow.set_terminated")[-1]["status"] == "FINISHED"
    assert calls(journal, "trackio.Run.finish")
    assert set(json.loads((folder / STATE).read_text())) == {"key"}


def test_trackers_are_told_the_steps_of_the_log(tmp_path: Path, decided: RunConfig, journal: Path) -> None:
    sparse = decided.with_values({"training.logging_steps": 4})
    told(tmp_path / "run", sparse, "trackio")
    assert [call["step"] for call in calls(journal, "trackio.Run.log") if "train/loss" in call["metrics"]] == [4, 8, 9]


def test_what_a_tracker_prints_is_not_seen(
    tmp_path: Path, decided: RunConfig, journal: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told(tmp_path / "run", decided, *PRETENDED)
    assert len(calls(journal, "")) > 30
    assert capfd.readouterr() == ("", "")


def test_fault_077_a_tracker_cannot_ask_on_the_terminal(
    tmp_path: Path, decided: RunConfig, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKER_TROUBLE", "wandb.init.offline=asks")
    warned = [event for event in told(tmp_path / "run", decided, "wandb") if isinstance(event, Warned)]
    assert len(warned) == 1


# --- TensorBoard for real ----------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar that TensorBoard would show, each step once; a step that stands twice is a fault."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    result = {}
    for name in found.Tags()["scalars"]:
        events = found.Scalars(name)
        assert len({event.step for event in events}) == len(events), name
        result[name] = {event.step: event.value for event in events}
    result["texts"] = {name: found.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in found.Tags()["tensors"]}
    return result


def test_tensorboard_shows_a_run_that_was_killed_and_resumed_without_a_gap_or_a_double(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Crash(Exception):
        pass

    def crash(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise Crash

    with pytest.raises(Crash):
        run(asked(tmp_path / "out", "tensorboard"), crash)
    heard: list[Event] = []
    folder = RunFolder(tmp_path / "out" / "run")
    resume(folder, heard.append)
    assert (2, "checkpoint-2") in [(event.step, event.checkpoint) for event in heard if isinstance(event, Resumed)]
    shown = scalars(folder.path / "tensorboard")
    losses = {event.step: event.loss for event in folder.replay() if isinstance(event, Stepped)}
    assert shown["train/loss"] == pytest.approx(losses) and set(losses) == {1, 2, 3, 4}
    assert set(shown["eval/loss"]) == {0, 2, 4}
    assert "lora.r: 16" in shown["texts"]["hyperparameters"]
    assert {"samples/1", "samples/2", "samples/3"} <= set(shown["texts"])


# --- going on ----------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_same_run_of_each_tracker(tmp_path: Path, decided: RunConfig, journal: Path) -> None:
    told(tmp_path / "run", decided, *PRETENDED, story=STORY[:6])
    key = json.loads((tmp_path / "run" / STATE).read_text())["key"]
    assert calls(journal, "mlflow.set_terminated")[-1]["status"] == "KILLED"
    told(tmp_path / "run", decided, *PRETENDED, story=[Resumed(3, "checkpoint-3"), *STORY[5:]])
    assert json.loads((tmp_path / "run" / STATE).read_text()) == {"key": key}
    assert [(call["id"], call["resume"]) for call in calls(journal, "wandb.init")] == [(key, "allow")] * 2
    assert [(call["name"], call["resume"]) for call in calls(journal, "trackio.init")] == [(f"run-{key}", "allow")] * 2
    assert len(calls(journal, "mlflow.create_run")) == 1
    assert calls(journal, "mlflow.update_run")[0] | {"pid": 0} == {
        "call": "mlflow.update_run",
        "pid": 0,
        "run_id": "c0ffee",
        "status": "RUNNING",
    }
    assert calls(journal, "wandb.Run.define_metric")[-1]["step_metric"] == "step"


@pytest.mark.parametrize(
    ("last", "state"),
    [
        (STORY[-1], "FINISHED"),
        (Failed("TRAIN-001", "the loss is nan"), "FAILED"),
        (Failed("STOP-002", "stopped after step 9"), "KILLED"),
    ],
)
def test_a_tracker_is_closed_as_the_run_ended(tmp_path: Path, decided: RunConfig, journal: Path, last: Event, state: str) -> None:
    told(tmp_path / "run", decided, "mlflow", "wandb", story=[*STORY[:-1], last])
    assert [call["status"] for call in calls(journal, "mlflow.set_terminated")] == [state]
    assert [call["exit_code"] for call in calls(journal, "wandb.Run.finish")] == [0 if state == "FINISHED" else 1]
    if isinstance(last, Failed):
        (tag,) = calls(journal, "mlflow.set_tag")
        assert tag["value"] == f"{last.code}: {last.problem}"


def test_a_killed_run_leaves_closed_trackers_and_no_process(tmp_path: Path, journal: Path) -> None:
    words = ["--model", "demo", "--data", "sample:chat", "--max-steps", "1000", "--trackers", "mlflow", "--run-name", "run"]
    environment = os.environ | {"PYTHONPATH": f"{STANDINS}{os.pathsep}{ROOT / 'src'}"}
    with subprocess.Popen([*FINETUNE, *words], cwd=tmp_path, env=environment, stdout=-3, stderr=-3) as process:
        try:
            until(lambda: any(call["metrics"] for call in calls(journal, "mlflow.log_batch")))
        finally:
            process.kill()
    until(lambda: calls(journal, "mlflow.set_terminated"))
    assert calls(journal, "mlflow.set_terminated")[0]["status"] == "KILLED"
    until(lambda: not alive(calls(journal, "mlflow")[0]["pid"]))


def until(true: Callable[[], Any], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process is there, dead ones that nobody has buried aside."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


# --- wandb's mode ------------------------------------------------------------------------------------------


def modes(journal: Path) -> list[str]:
    return [call["call"].rpartition(".")[2] for call in calls(journal, "wandb.init")]


def test_wandb_is_online_only_for_who_is_logged_in(
    tmp_path: Path, decided: RunConfig, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(tmp_path / "a", decided, "wandb")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    told(tmp_path / "b", decided, "wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    told(tmp_path / "c", decided, "wandb")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}")
    (tmp_path / ".netrc").chmod(0o600)
    told(tmp_path / "d", decided, "wandb")
    assert modes(journal) == ["offline", "online", "offline", "online"]


def test_wandb_goes_offline_where_its_server_cannot_be_used(
    tmp_path: Path, decided: RunConfig, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("TRACKER_TROUBLE", "wandb.init.online=raises")
    (warned,) = (event for event in told(tmp_path / "run", decided, "wandb") if isinstance(event, Warned))
    assert warned.message.startswith("wandb: its server cannot be used, so it records offline")
    assert modes(journal) == ["online", "offline"] and calls(journal, "wandb.Run.finish")


# --- trouble -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["wandb.init.offline", "wandb.Run.log", "wandb.Summary.update", "wandb.Run.finish"])
@pytest.mark.parametrize("kind", ["raises", "exits", "dies", "hangs"])
def test_fault_077_a_tracker_that_fails_is_told_once_and_left_out(
    tmp_path: Path, decided: RunConfig, journal: Path, monkeypatch: pytest.MonkeyPatch, call: str, kind: str
) -> None:
    monkeypatch.setenv("TRACKER_TROUBLE", f"{call}={kind}")
    if kind == "hangs":  # else its processes may take as long as a busy machine needs to start them
        monkeypatch.setattr(tracking, "CLOSING", 2.4)

    ready = 0.0

    def the_other_has_only_to_finish() -> None:
        nonlocal ready
        until(lambda: any("checkpoint/bytes" in call["metrics"] for call in calls(journal, "trackio.Run.log")))
        ready = time.monotonic()

    heard = told(tmp_path / "run", decided, "wandb", "trackio", before_last=the_other_has_only_to_finish)
    assert time.monotonic() - ready < 30
    warned = [event.message for event in heard if isinstance(event, Warned)]
    why = {
        "raises": "ValueError: a fault of the tracker's own",
        "exits": "SystemExit: 3",
        "dies": "its process ended with code 9",
        "hangs": "it did not finish within 2 seconds",
    }[kind]
    assert warned == [f"the run is no longer recorded by wandb: {why}"]
    assert [event for event in heard if not isinstance(event, Warned)] == STORY
    assert calls(journal, "trackio.Run.finish"), "the other one is not concerned"
    assert not alive(calls(journal, "wandb")[0]["pid"])


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "final" / "adapter_model.safetensors").read_bytes()).hexdigest()


def optimizers(folder: Path) -> str:
    return hashlib.sha256((folder / "checkpoint-4" / "optimizer.safetensors").read_bytes()).hexdigest()


def test_fault_077_training_is_the_same_to_the_bit_with_trackers_that_work_and_that_fail(
    tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"lora__dropout": 0.1}
    run(asked(tmp_path / "none", **config))
    run(asked(tmp_path / "good", *PRETENDED, **config))
    monkeypatch.setenv("TRACKER_TROUBLE", "trackio.Run.log=raises")
    heard: list[Event] = []
    run(asked(tmp_path / "bad", *PRETENDED, **config), heard.append)
    assert len(of_trackers(heard)) == 1
    assert any(isinstance(event, Finished) for event in heard)
    folders = [tmp_path / name / "run" for name in ("none", "good", "bad")]
    assert len({weights(folder) for folder in folders}) == 1
    assert len({optimizers(folder) for folder in folders}) == 1
    assert "no longer recorded by trackio" in (folders[2] / "run.log").read_text()


def test_fault_077_a_tracker_that_reads_nothing_never_stops_the_loop(
    tmp_path: Path, decided: RunConfig, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "MOST_WAITING", 1 << 20)
    slow = Pipe.__new__(Pipe)
    monkeypatch.setattr(pipe, "START", "import time; time.sleep(3600)")
    slow.__init__("wandb")  # type: ignore[misc]
    started, accepted = time.monotonic(), 0
    while slow.send({"text": "x" * 1000}):
        accepted += 1
    assert 1000 < accepted < 1400 and time.monotonic() - started < 60, "its reader sleeps for an hour"
    assert not slow.wait(time.monotonic() + 0.1)
    slow.end()
    monkeypatch.setattr(tracking, "CLOSING", 0.2)
    long = [Sampled(0, "x" * 2_000_000, "y"), *STORY]
    warned = [event.message for event in told(tmp_path / "run", decided, "wandb", story=long) if isinstance(event, Warned)]
    assert warned == ["the run is no longer recorded by wandb: it is too slow"]


@pytest.mark.parametrize("name", PRETENDED)
def test_fault_071_a_full_disk_under_a_tracker_costs_one_warning(
    tmp_path: Path, decided: RunConfig, journal: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call = {"wandb": "wandb.Run.log", "trackio": "trackio.Run.log", "mlflow": "mlflow.log_batch"}[name]
    monkeypatch.setenv("TRACKER_TROUBLE", f"{call}=full")
    heard = told(tmp_path / "run", decided, name)
    warned = [event.message for event in heard if isinstance(event, Warned)]
    assert warned == [f"the run is no longer recorded by {name}: OSError: [Errno 28] No space left on device"]
    assert heard[-1] == STORY[-1] or heard[-2] == STORY[-1]


def test_fault_071_the_disk_of_tensorboard_is_really_full(tmp_path: Path) -> None:
    """Its folder is a file system of one page, which is taken when the run goes on."""
    pytest.importorskip("tensorboard")

    def crash(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(asked(tmp_path / "out", "tensorboard"), crash)
    mount = "mount -t tmpfs -o size=4k tmpfs out/run/tensorboard && head -c 4096 /dev/zero > out/run/tensorboard/full"
    done = unshared(tmp_path, mount, *FINETUNE, "resume", "run", "--output-dir", "out")
    assert done.code == 0, done.err
    folder = RunFolder(tmp_path / "out" / "run")
    warned = of_trackers(folder.replay())
    assert folder.finished
    assert len(warned) == 1 and "no longer recorded by tensorboard" in warned[0] and "No space left" in warned[0]
    assert "Traceback" not in done.err


def test_a_state_file_that_cannot_be_written_or_read_is_no_end(tmp_path: Path, decided: RunConfig, journal: Path) -> None:
    (tmp_path / "run" / STATE).mkdir(parents=True)
    (warned,) = (event for event in told(tmp_path / "run", decided, "wandb") if isinstance(event, Warned))
    assert "trackers.json cannot be written" in warned.message
    assert calls(journal, "wandb.Run.finish")


# --- secrets -----------------------------------------------------------------------------------------------

CANARIES = {
    "HF_TOKEN": "hf_" + "CanaryHub" * 4,
    "WANDB_API_KEY": "c0ffee" * 6 + "abcd",
    "MLFLOW_TRACKING_TOKEN": "canary-mlflow-token-17",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-password-17",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/secret/17",
}
STORED = "hf_" + "CanaryFile" * 3 + "Abcd"


def test_what_looks_like_a_secret_and_the_home_are_taken_out_of_texts() -> None:
    cleaned = Cleaner({"MY_TOKEN": SECRET, "SHORT_KEY": "true", "PATH": "/usr/bin:/bin"})
    home = str(Path.home())
    assert cleaned(f"say {SECRET}, {STORED} and {home}/x is true in /usr/bin:/bin") == (
        "say (hidden), (hidden) and ~/x is true in /usr/bin:/bin"
    )
    assert "s3cretpw" not in cleaned("https://somebody:s3cretpw@example.org/x")


def test_a_tracker_is_not_told_secrets_and_its_complaints_do_not_repeat_them(
    tmp_path: Path, decided: RunConfig, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("TRACKER_TROUBLE", "wandb.Run.finish=tells")
    decided = decided.with_values({"data.system_prompt": f"The key is {SECRET}."})
    story = [Sampled(0, f"Is it {SECRET}?", f"No, {STORED}", ""), stepped(1), Failed("X-1", f"{tmp_path} and {SECRET}")]
    heard = told(tmp_path / "run", decided, "wandb", "mlflow", "trackio", story=story)
    (warned,) = (event for event in heard if isinstance(event, Warned))
    assert "ConnectionError: 401 for (hidden) in ~/x" in warned.message
    written = journal.read_text()
    assert "The key is (hidden)." in written and "Is it (hidden)?" in written and "No, (hidden)" in written
    assert SECRET not in written and STORED not in written and str(tmp_path) not in written


@pytest.fixture
def canaries(tmp_path: Path, journal: Path) -> dict[str, str]:
    """The environment of a user with tokens everywhere: variables, the hub's token file, wandb's netrc."""
    home = tmp_path / "home"
    (home / "hub").mkdir(parents=True)
    (home / "hub" / "token").write_text(STORED)
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {CANARIES['WANDB_API_KEY']}")
    (home / ".netrc").chmod(0o600)
    return CANARIES | {
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "PYTHONPATH": f"{STANDINS}{os.pathsep}{ROOT / 'src'}",
        "TRACKER_JOURNAL": str(journal),
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nobody answers there
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }


def leaks(folder: Path, said: list[str]) -> list[str]:
    """Where a canary is found: in what was said, and in all files but the two that hold tokens by their trade."""
    secrets = [value.encode() for value in (*CANARIES.values(), STORED)]
    texts = {f"output {number}": text.encode() for number, text in enumerate(said)}
    kept = {folder / "home" / "hub" / "token", folder / "home" / ".netrc"}
    texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path not in kept}
    return [name for name, text in texts.items() if any(secret in text or secret in name.encode() for secret in secrets)]


def test_fault_119_tokens_are_in_nothing_that_any_command_writes_or_says(
    tmp_path: Path, canaries: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training in a process of its own, as users have it; what needs no tracker afterwards in this one, for speed."""
    names = [name for name in ALL if name != "tensorboard" or installed("tensorboard")]
    rows = [{"prompt": f"Say {n}.", "response": f"It is {n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["--model", "demo", "--data", "rows.jsonl", "training.batch_size=2", "evaluation.generation.max_new_tokens=3"]
    apart = [
        (0, [*train, "--max-steps", "2", "--run-name", "run", "--trackers", f"[{', '.join(names)}]"]),
        (0, ["resume", "outputs/run", "--max-steps", "3"]),
    ]
    here = [
        (0, ["eval", "outputs/final", "--data", "rows.jsonl"]),
        (0, ["generate", "outputs/final", "--prompt", "Who are you?"]),
        (0, ["plan", "--model", "demo", "--data", "rows.jsonl"]),
        (5, ["plan", "--model", "nobody/nothing", "--data", "rows.jsonl"]),
        (2, ["resume", "outputs/other"]),
    ]
    said = []
    for code, words in apart:
        done = finetune(tmp_path, *words, environment=canaries)
        assert done.code == code, done.err
        said += [done.out, done.err]
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    for code, words in here:
        assert main(words) == code
        said += capfd.readouterr()
    assert calls(Path(canaries["TRACKER_JOURNAL"]), "mlflow.set_terminated"), "the trackers worked"
    assert leaks(tmp_path, said) == []
    (tmp_path / "planted").write_text(f"x{STORED}y")
    assert leaks(tmp_path, []) == [str(tmp_path / "planted")], "the search finds what is there"


def installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
