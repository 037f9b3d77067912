"""A search over settings: what is searched, that it can be repeated and stopped at any time, and what it says is best."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faces import FINETUNE, answer
from llm_finetune_kit import material
from llm_finetune_kit.config import RunConfig
from llm_finetune_kit.errors import ConfigError, Interrupted, MachineError, UsageError
from llm_finetune_kit.events import Evaluated, Event, Stage
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.hardware import this_machine
from llm_finetune_kit.planning import plan_run
from llm_finetune_kit.settings import load_config
from llm_finetune_kit.tuning.search import _proposal, _settings, go_on, tune
from llm_finetune_kit.tuning.space import Choices, Range, at_edge, combinations, default_space, read_space, searched_words
from llm_finetune_kit.tuning.study import Study, Trial, begin, read_study

RATE = "training.learning_rate"
RATES = {RATE: "5e-3,3e-3,2e-3,1e-7"}  # with the seed below the hopeless one comes last
COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "brown", "gold", "teal")
ROWS = [{"prompt": f"Say {colour}.", "response": f"{colour} it is."} for colour in COLOURS]
VALUES: dict[str, Any] = {
    "model.name": "demo",
    "model.dtype": "float32",
    "lora.r": 4,
    "data.validation_split": 0.4,
    "training.max_steps": 6,
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.eval_steps": 1,
    "training.seed": 20,
    "evaluation.generation.max_new_tokens": 1,
}


def asked(place: Path, **more: Any) -> RunConfig:
    values = VALUES | {"data.train_file": ROWS, "output.output_dir": str(place)}
    return load_config(values=values | {knob.replace("__", "."): value for knob, value in more.items()})[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of four learning rates, one of which teaches nothing."""
    place = tmp_path_factory.mktemp("tune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_FINETUNE_KIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return tune(asked(place), RATES, trials=9)


# --- what is searched ---------------------------------------------------------------------------------------


def test_ranges_lists_and_fixed_settings_are_told_apart() -> None:
    words = ["lr=1e-4..3e-3", "lora.r=8,16", "lora.target_modules=[q_proj,v_proj]", "data.system_prompt=Be kind, and brief..."]
    searched, fixed = searched_words([*words, "data.train_file=../a,b.jsonl", "training.max_steps=5"])
    assert searched == {RATE: "1e-4..3e-3", "lora.r": "8,16"}
    assert fixed == [words[2], words[3], "data.train_file=../a,b.jsonl", "training.max_steps=5"]
    texts = searched | {"lora.alpha": "4..64", "lora.dropout": "0.01..0.2", "lora.target_modules": "all-linear,[q_proj,v_proj]"}
    space = read_space(texts | {"training.weight_decay": "0..0.1", "training.schedule": "cosine,linear"}, RunConfig())
    assert space == {
        RATE: Range(1e-4, 3e-3, whole=False, log=True),
        "lora.r": Choices((8, 16)),
        "lora.alpha": Range(4, 64, whole=True, log=True),
        "lora.dropout": Range(0.01, 0.2, whole=False, log=False),
        "lora.target_modules": Choices(("all-linear", ["q_proj", "v_proj"])),
        "training.weight_decay": Range(0, 0.1, whole=False, log=False),
        "training.schedule": Choices(("cosine", "linear")),
    }
    assert combinations(space) == math.inf
    assert combinations(read_space({"lora.r": "4..7", "method": "lora,full,lora"}, RunConfig())) == 8


@pytest.mark.parametrize(
    ("word", "code", "words"),
    [
        ("training.schedule=cosine..linear", 81, "no number"),
        ("training.packing=false..true", 80, "what is learned stays the same"),
        (f"{RATE}=3e-3..1e-4", 82, "from a smaller to a larger"),
        (f"{RATE}=1e-3..high", 3, "expected a number"),
        (f"{RATE}=1e-3..2", 4, "up to 1"),
        ("lora.r=8,,16", 82, "empty place"),
        ("lora.r=8,1.5", 3, "a whole number"),
        ("lora.r=0..8", 4, "from 1 to 1,024"),
        ("model.name=demo,gpt2", 80, "same rows, tokens"),
        ("data.max_samples=10,20", 80, "same rows, tokens"),
        ("training.seed=1..9", 80, "same rows, tokens"),
    ],
)
def test_what_no_trial_could_take_is_refused_before_anything_runs(word: str, code: int, words: str, tmp_path: Path) -> None:
    searched, fixed = searched_words([word])
    assert not fixed
    with pytest.raises(ConfigError) as refused:
        tune(asked(tmp_path / "out"), searched)
    assert refused.value.number == code and words in f"{refused.value.problem} {refused.value.why}"
    assert not (tmp_path / "out").exists()


def test_a_knob_is_searched_once() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        searched_words(["lr=1e-4..1e-3", f"{RATE}=1e-3,1e-4"])


def test_without_a_setting_the_planned_rate_is_searched_ten_times_each_way() -> None:
    assert default_space(2e-4) == {RATE: "2e-05..0.002"}
    assert default_space(0.5) == {RATE: "0.05..1"}


def test_a_share_of_a_range_is_a_number_in_it() -> None:
    rates, ranks = Range(1e-4, 1e-2, whole=False, log=True), Range(4, 64, whole=True, log=True)
    assert rates.at(0.5) == pytest.approx(1e-3) and (rates.at(0.0), rates.at(1.0)) == (1e-4, 1e-2)
    assert (ranks.at(0.0), ranks.at(1.0), type(ranks.at(0.4))) == (4, 64, int)
    assert [Choices(("a", "b", "c")).at(share) for share in (0.0, 0.3, 0.34, 0.99, 1.0)] == ["a", "a", "b", "c", "c"]


@pytest.mark.parametrize(("value", "edge"), [(1.1e-4, True), (3e-4, False), (9.5e-4, True)])
def test_a_best_value_at_an_end_is_told(value: float, edge: bool) -> None:
    assert at_edge(Range(1e-4, 1e-3, whole=False, log=True), value) is edge
    assert at_edge(Choices((8, 16, 32)), 32) and not at_edge(Choices((8, 16, 32)), 16) and not at_edge(Choices(("a", "b")), "a")


def test_missing_optuna_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MachineError) as missing:
        tune(asked(tmp_path / "out"))
    assert missing.value.fix == "pip install 'llm-finetune-kit[tune]'" and not (tmp_path / "out").exists()


# --- proposals, with a loss that is a formula ----------------------------------------------------------------


def proposed(place: Path, seed: int, count: int, *, stopped_after: int = -1) -> list[dict[str, Any]]:
    """The settings of some trials whose loss is least at a rate of 1e-3 and r of 16; the study may be read anew between two."""
    texts = {RATE: "1e-5..1e-1", "lora.r": "4..64"}
    config = RunConfig().with_values({"training.seed": seed})
    study = begin(Study(place, config, texts, count, {}, {}, {RATE: 2e-3, "lora.r": 8}), "study")
    space = read_space(texts, config)
    for number in range(count):
        settings = _settings(_proposal(study, space), space)
        loss = abs(math.log10(settings[RATE]) + 3) + abs(math.log2(settings["lora.r"] / 16))
        study.trials.append(Trial(number + 1, settings, "done", [(1, loss)], 1))
        study.keep()
        study = read_study(study.folder) if number == stopped_after else study
    return [trial.settings for trial in study.trials]


def test_the_same_seed_gives_the_same_trials_also_when_it_was_stopped(tmp_path: Path) -> None:
    first = proposed(tmp_path, 1, 12)
    assert first == proposed(tmp_path, 1, 12, stopped_after=6)
    assert first[1:] != proposed(tmp_path, 2, 12)[1:]
    assert first[0] == {RATE: 2e-3, "lora.r": 8}  # what the plan would take
    assert all(1e-5 <= one[RATE] <= 1e-1 and 4 <= one["lora.r"] <= 64 for one in first)
    assert len({json.dumps(one) for one in first}) == 12
    assert sorted(math.floor(math.log10(one[RATE])) for one in first[1:5]) == [-5, -4, -3, -2]  # spread, not drawn


def test_a_small_space_is_searched_whole_and_nothing_twice() -> None:
    texts = {"lora.r": "4..6", "training.schedule": "cosine,linear"}
    study = Study(Path(), RunConfig(), texts, 6, {}, {}, {})
    space = read_space(texts, study.config)
    for number in range(6):
        study.trials.append(Trial(number + 1, _settings(_proposal(study, space), space), "failed"))
    assert len({json.dumps(trial.settings) for trial in study.trials}) == combinations(space) == 6


# --- studies that run ----------------------------------------------------------------------------------------


def test_the_best_is_the_lowest_loss_that_any_run_measured(study: Study) -> None:
    assert [trial.number for trial in study.trials] == [1, 2, 3, 4]  # nine were asked for, and there are no more
    lowest = {}
    for trial in study.trials:
        told = RunFolder(study.folder / f"trial-{trial.number}").replay()
        lowest[trial.number] = min(event.loss for event in told if isinstance(event, Evaluated) and event.step > 0)
        assert trial.loss == lowest[trial.number]
    assert study.best.number == min(lowest, key=lambda number: lowest[number]) and study.loss_before is not None
    assert study.loss_before > lowest[study.best.number]
    best, _ = load_config(study.folder / "best.yaml")
    assert best.training.learning_rate == study.best.settings[RATE]
    own = {RATE, "data.train_file"}
    assert best.with_values(dict.fromkeys(own)) == study.config.with_values(dict.fromkeys(own))


def test_a_hopeless_trial_is_stopped_early_and_marked(study: Study) -> None:
    states = {trial.settings[RATE]: (trial.state, trial.steps) for trial in study.trials}
    assert states == {5e-3: ("done", 6), 3e-3: ("done", 6), 2e-3: ("done", 6), 1e-7: ("pruned", 2)}
    stopped = RunFolder(study.folder / "trial-4")
    assert stopped.finished and not any(isinstance(event, Evaluated) and event.step > 2 for event in stopped.replay())


def test_the_same_search_again_shows_what_is_known(study: Study) -> None:
    told: list[Event] = []
    again = tune(study.config, RATES, trials=2, listen=told.append)
    assert again.folder == study.folder and again.trials == study.trials
    assert not any(isinstance(event, Stage) and event.name == "trial" for event in told)


def test_a_signal_leaves_a_study_that_goes_on(study: Study, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        tune(asked(tmp_path), RATES, trials=1, listen=stop)
    [folder] = tmp_path.iterdir()
    assert stopped.value.exit_code == 143 and stopped.value.fix == f"go on with: finetune tune --resume {folder}"
    assert read_study(folder).trials == [] and RunFolder(folder / "trial-1").checkpoints()
    steps: list[int] = []
    done = go_on(folder, listen=lambda event: steps.append(event.step) if isinstance(event, Evaluated) else None)
    assert steps and min(steps) > 2  # from its checkpoint
    assert done.trials == study.trials[:1]


def test_a_killed_study_goes_on_to_the_same_trials(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fixed = [f"{knob}={value}" for knob, value in VALUES.items() if knob != "training.max_steps"]
    words = ["tune", "--run-name", "mine", "--data", "rows.jsonl", "--max-steps", "6", *fixed, f"{RATE}={RATES[RATE]}"]
    here = {**os.environ, "FINETUNE_FAULT": "rename:9:kill", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([*FINETUNE, *words], cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    [folder] = (tmp_path / "outputs").iterdir()
    assert killed.returncode == -signal.SIGKILL and read_study(folder).running == study.trials[0].settings, killed.stderr
    monkeypatch.chdir(tmp_path)
    code, out, err = answer(capsys, "tune", "--resume", str(folder), "--trials", "2", "--json")
    told = json.loads(out)
    assert code == 0 and folder.name == "mine" and load_config(folder / "best.yaml")[0].output.run_name is None, err
    assert [one["evaluations"] for one in sorted(told["trials"], key=lambda one: one["number"])] == [
        [list(pair) for pair in trial.evaluations] for trial in study.trials[:2]
    ]
    assert told["best"]["trial"] == 2 and told["held_out"] == {"rows": 4, "target_tokens": study.held_out["target_tokens"]}
    second = max(trial.loss for trial in study.trials[:2] if trial.loss is not None)
    assert told["better_than_second_by"] == pytest.approx(second - told["best"]["loss"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    assert answer(capsys, "tune", "--resume", str(folder))[0] == 2


def test_a_trial_that_does_not_fit_is_told_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, machine = asked(tmp_path, training__max_steps=1), this_machine(tmp_path)
    need = {r: plan_run(config.with_values({"lora.r": r})).needed_memory for r in (4, 1024)}
    small = replace(machine, free_memory=sum(need.values()) // 2)
    monkeypatch.setattr(material, "this_machine", lambda folder: small)
    told: list[Event] = []
    found = tune(config, {"lora.r": "1024,4"}, listen=told.append)
    assert {trial.settings["lora.r"]: trial.state for trial in found.trials} == {4: "done", 1024: "skipped"}
    assert any(isinstance(event, Stage) and "skipped (MACHINE-020: needs about" in event.detail for event in told)
    assert found.best.settings == {"lora.r": 4}


def test_a_search_without_held_out_rows_or_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows are held out"):
        tune(asked(tmp_path / "out", data__validation_split=0.0))
    with pytest.raises(UsageError, match="is no study"):
        go_on(tmp_path)
    with pytest.raises(UsageError, match="no trial came to a held-out loss"):
        Study(tmp_path, RunConfig(), {}, 1, {}, {}, {}, trials=[Trial(1, {}, "failed")]).to_dict()
    assert not (tmp_path / "out").exists()


def test_the_command_shows_trials_and_what_to_think_of_the_best(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, "tune", "--resume", str(study.folder))
    assert code == 0, err
    rows = out.split("\n\n")[0].split("\n")
    assert rows[1].split()[0] == str(study.best.number) and "pruned (above the median of the others)" in rows[4]
    assert "4 held-out rows" in out and "looks better than it is" in out and f"{study.folder}/best.yaml" in out.replace("\n", "")
    assert answer(capsys, "tune", "--resume", str(study.folder), "--max-steps", "9")[0] == 2
