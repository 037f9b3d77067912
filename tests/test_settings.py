"""Configs: what YAML, the command line and Python may say, and what is told when it is wrong. No torch needed."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from llm_finetune_kit.arguments import FLAGS, asked_config
from llm_finetune_kit.cli import _parser
from llm_finetune_kit.config import ALIASES, RunConfig, demo_values, knobs
from llm_finetune_kit.errors import ConfigError, KitError
from llm_finetune_kit.plain_yaml import dump_yaml, read_yaml
from llm_finetune_kit.settings import changed, expected, load_config
from llm_finetune_kit.trainers import QuickTrainer, knob_named

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# R0, section 3.1, word for word.
R0 = """\
model:
  name: "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
  max_length: 512

training:
  batch_size: 4
  learning_rate: 2e-4
  num_epochs: 3
  gradient_accumulation_steps: 4
  warmup_steps: 100
  save_steps: 500
  eval_steps: 500
  logging_steps: 50

lora:
  r: 16
  alpha: 32
  dropout: 0.1
  target_modules: ["q_proj", "v_proj"]

data:
  train_file: "data/train.json"
  eval_file: "data/eval.json"
  max_samples: 1000

output:
  output_dir: "outputs"
  run_name: "tinyllama-finetune"
"""
R0_VALUES = {
    "model": {"name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "max_length": 512},
    "training": {
        "batch_size": 4,
        "learning_rate": 0.0002,
        "num_epochs": 3.0,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 100,
        "save_steps": 500,
        "eval_steps": 500,
        "logging_steps": 50,
    },
    "lora": {"r": 16, "alpha": 32, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "data": {"train_file": "data/train.json", "eval_file": "data/eval.json", "max_samples": 1000},
    "output": {"output_dir": "outputs", "run_name": "tinyllama-finetune"},
}


def load(folder: Path, text: str | bytes, *overrides: str) -> RunConfig:
    path = folder / "cfg.yaml"
    path.unlink(missing_ok=True)  # many times faster than cutting a file to nothing and writing it again
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, overrides)[0]


def refused(folder: Path, text: str | bytes, *overrides: str) -> ConfigError:
    """The error; it must exit 2, name the file and say how to put it right."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    assert "cfg.yaml" in caught.value.where or caught.value.where == "command line"
    return caught.value


def get(config: RunConfig, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def tree_of(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


# --- what R0 asks ------------------------------------------------------------------------------------------


def test_the_config_of_r0_gives_exactly_its_values(tmp_path: Path) -> None:
    config = load(tmp_path, R0)
    for section, values in R0_VALUES.items():
        assert getattr(config, section).model_dump(include=set(values)) == values
    others = {
        path: get(config, path) for path in knobs() if path.partition(".")[2] not in R0_VALUES.get(path.partition(".")[0], {})
    }
    assert others == {path: get(RunConfig(), path) for path in others}, "nothing that R0 leaves out is changed"


def test_the_default_config_file_holds_the_values_of_r0() -> None:
    assert load_config(ROOT / "configs/training_config.yaml")[0].asked() == changed(RunConfig(), flat(R0_VALUES)).asked()


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}


def every(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """All knobs of a config tree with their dotted paths."""
    found = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found += every(value, f"{path}.") if isinstance(value, dict) and path not in knobs() else [(path, value)]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_config_is_taken_as_written(path: Path) -> None:
    config, notes = load_config(path)
    assert notes == [], "a shipped config uses the canonical names"
    tree, lines = read_yaml(path.read_text(encoding="utf-8"), str(path))
    assert lines
    written = dict(every(tree))
    assert {name: get(config, name) for name in written} == written


def test_the_demo_asks_for_knobs_that_exist() -> None:
    assert load_config(values=demo_values())[0].model.name == "demo"


# --- FAULTS.md, section 3.3 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-5", 1e-5),
        ("2E-4", 2e-4),
        ("1.e-3", 1e-3),
        (".5", 0.5),
        ("+1e-2", 1e-2),
        ("1", 1.0),
        ("0.0002", 2e-4),
        ("'1e-5'", 1e-5),
    ],
)
def test_fault_033_numbers_with_an_exponent_are_numbers(tmp_path: Path, written: str, number: float) -> None:
    assert load(tmp_path, f"training:\n  learning_rate: {written}\n").training.learning_rate == number


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("training: {max_steps: 012}", "training.max_steps", 12),  # YAML 1.1: octal 10
        ("training: {max_steps: 1_000}", "training.max_steps", 1000),
        ("output: {run_name: no}", "output.run_name", "no"),  # YAML 1.1: false
        ("output: {run_name: on}", "output.run_name", "on"),
        ("output: {run_name: 1:30}", "output.run_name", "1:30"),  # YAML 1.1: 90
        ("output: {run_name: 2024-01-31}", "output.run_name", "2024-01-31"),  # YAML 1.1: a date
        ("output: {run_name: 0x1F}", "output.run_name", "0x1F"),  # YAML 1.1: 31
        ("training: {packing: no}", "training.packing", False),
        ("training: {packing: false}", "training.packing", False),
        ("evaluation: {prompts: [yes, no]}", "evaluation.prompts", ["yes", "no"]),
    ],
)
def test_fault_034_plain_words_mean_what_they_look_like(tmp_path: Path, text: str, path: str, value: Any) -> None:
    assert get(load(tmp_path, text), path) == value


@pytest.mark.parametrize(
    ("text", "words", "fix"),
    [
        ("output:\n  run_name: 012\n", "output.run_name is 12, expected a plain name", 'run_name: "12"'),
        ("data:\n  system_prompt: true\n", "data.system_prompt is true, expected text", '"true"'),
        ("training:\n  max_steps: 1:30\n", "training.max_steps is '1:30', expected a whole number", ""),
        ("training:\n  max_steps: 0x10\n", "training.max_steps is '0x10'", ""),
        ("training:\n  max_steps: true\n", "training.max_steps is true", ""),
    ],
)
def test_fault_034_what_could_be_misread_is_refused_with_the_quoted_fix(tmp_path: Path, text: str, words: str, fix: str) -> None:
    error = refused(tmp_path, text)
    assert words in error.problem
    assert fix in error.fix
    assert error.where.endswith("line 2")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("training:\n  max_steps: 1\n  seed: 2\n  max_steps: 3\n", "lines 2 and 4"),
        ("training:\n  max_steps: 1\nmodel:\n  name: demo\ntraining:\n  seed: 1\n", "lines 1 and 5"),
        ("batch_size: 2\ntraining:\n  batch_size: 3\n", "lines 1 and 3"),  # one knob by two names
        ("lora:\n  rank: 4\n  r: 8\n", "lines 2 and 3"),
    ],
)
def test_fault_035_a_key_that_stands_twice_is_an_error_with_both_lines(tmp_path: Path, text: str, lines: str) -> None:
    assert refused(tmp_path, text).where.endswith(lines)


@pytest.mark.parametrize(
    ("text", "line", "meant"),
    [
        ("training:\n  learning_rat: 1e-4\n", 2, "training.learning_rate"),
        ("training:\n  seed: 1\n  max_step: 5\n", 3, "training.max_steps"),
        ("trainig:\n  max_steps: 5\n", 1, "training"),
        ("lora:\n  # rank\n\n  apha: 32\n", 4, "lora.alpha"),
        ("model:\n  learning_rate: 1e-4\n", 2, "training.learning_rate"),  # right name, wrong section
        ("evaluation:\n  generation:\n    temprature: 1\n", 3, "evaluation.generation.temperature"),
        ("dropout: 0.1\n", 1, "lora.dropout"),
    ],
)
def test_fault_036_an_unknown_key_is_named_with_its_line_and_the_nearest_name(
    tmp_path: Path, text: str, line: int, meant: str
) -> None:
    error = refused(tmp_path, text)
    assert error.problem.startswith("unknown setting ")
    assert error.where.endswith(f"line {line}")
    assert error.fix == f"did you mean {meant}?"


def test_fault_036_a_word_like_no_other_gets_the_list_of_its_section(tmp_path: Path) -> None:
    assert "settings of lora: r, alpha, dropout, target_modules" in refused(tmp_path, "lora: {zzz: 1}").fix
    assert "sections: data, evaluation, lora, method, model, output, training" in refused(tmp_path, "zzz: 1").fix


@pytest.mark.parametrize(
    ("knob", "value", "words"),
    [
        ("training.learning_rate", "fast", "expected a number above 0 and up to 1"),
        ("training.learning_rate", "-1", "above 0"),
        ("training.learning_rate", ".nan", "above 0"),
        ("training.learning_rate", ".inf", "above 0"),
        ("training.num_epochs", ".inf", "above 0 and up to 100,000"),
        ("training.batch_size", "0", "expected a whole number from 1 to 10,000,000"),
        ("training.batch_size", "2.5", "whole number"),
        ("training.batch_size", "", "is null, expected a whole number"),
        ("training.batch_size", "[1]", "is [1], expected a whole number"),
        ("training.batch_size", "{a: 1}", "expected a whole number"),
        ("training.max_steps", "9" * 40, "from 1 to 10,000,000"),
        ("training.warmup_steps", "-1", "from 0 to"),
        ("training.seed", "4294967296", "of at least 0 and below 4,294,967,296"),
        ("training.schedule", "cosin", "is 'cosin', expected cosine, linear or constant"),
        ("training.packing", "maybe", "expected true or false"),
        ("lora.r", "0", "from 1 to 1,024"),
        ("lora.dropout", "0.95", "expected a number from 0 to 0.9"),
        ("lora.target_modules", "q_proj,v_proj", "expected a list such as [a, b] or all-linear"),
        ("lora.target_modules", "[1, 2]", "is [1, 2], expected a list"),
        ("data.validation_split", "1", "below 1"),
        ("data.train_file", "[1, 2]", "expected text or a list of rows"),
        ("model.dtype", "fp8", "expected float32, bfloat16 or float16"),
        ("output.run_name", "../elsewhere", "expected a plain name"),
        ("output.run_name", "a/b", "expected a plain name"),
        ("method", "qlora", "expected lora or full"),
    ],
)
def test_fault_037_a_value_that_cannot_be_is_told_with_what_can(tmp_path: Path, knob: str, value: str, words: str) -> None:
    section, _, name = knob.rpartition(".")
    error = refused(tmp_path, f"# a line\n{section}:\n  {name}: {value}\n" if section else f"# a line\n\n{name}: {value}\n")
    assert error.problem.startswith(f"{knob} is ")
    assert words in error.problem
    assert error.where.endswith("line 3")
    assert str(knobs()[knob].description) in error.fix or "quotes" in error.fix or "nf4" in error.fix


@pytest.mark.parametrize("value", ["3", "[1]", "true", "text"])
def test_fault_037_a_section_must_hold_settings(tmp_path: Path, value: str) -> None:
    error = refused(tmp_path, f"model:\n  name: demo\ntraining: {value}\n")
    assert error.problem.startswith("training is ") and error.problem.endswith("expected a section with settings")
    assert error.where.endswith("line 3")
    assert "max_steps" in error.fix


def test_a_name_in_the_place_of_a_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    assert "write model: {name: demo}" in refused(tmp_path, "model: demo\n").fix


def test_a_section_whose_settings_are_all_commented_out_is_empty(tmp_path: Path) -> None:
    assert load(tmp_path, "model:\n  name: demo\ntraining:\n  # max_steps: 5\n").asked() == {"model": {"name": "demo"}}


def test_all_faults_of_a_file_are_told_at_once_in_the_order_of_its_lines(tmp_path: Path) -> None:
    text = "model:\n  nam: x\n  max_length: 2\ntraining:\n  batch_size: 0\n  learning_rate: fast\n  warmup: 3\nfoo: 1\n"
    error = refused(tmp_path, text, "lora.r=none")
    assert error.problem == "unknown setting model.nam"
    told = str(error).splitlines()
    assert told[1] == "  why:  6 more faults:"
    starts = ["line 3: model.max_length is 2", "line 5: training.batch_size is 0", "line 6: training.learning_rate is 'fast'"]
    starts += ["line 7: unknown setting training.warmup; did you mean", "line 8: unknown setting foo; sections:"]
    starts += ["command line: lora.r is 'none'"]
    for line, start in zip(told[2:8], starts, strict=True):
        assert line.strip().startswith(start)
    assert all(len(line) < 200 for line in told)


@pytest.mark.parametrize(
    ("text", "place", "fix"),
    [
        (b"training:\n\tmax_steps: 1\n", "line 2, column 1", "indent with spaces"),
        (b"training:\n  max_steps: 1\n   seed: 2\n", "line 3, column 8", "indentation"),
        (b"training:\n  max_steps: 1\n seed: 2\n", "line 3", "indentation"),
        (b'model:\n  name: "demo\ntraining:\n  seed: 1\n', "line 2, column 9", "close the quotes"),
        (b"lora:\n  target_modules: [q_proj, v_proj\n", "line 2, column 19", "close the bracket"),
        (b"data:\n  system_prompt: You are: kind\n", "line 2", "quotes"),
        (b"model:\n  name: a\0b\n", "line 2, column 10", "remove it"),
        (b"model:\n  name: demo\n---\nmodel:\n  name: gpt2\n", "line 3", "---"),
        ("model:\n  name: demo\n".encode("utf-16"), "line 1", "UTF-8"),
        ("model:\n  name: demo\n".encode("utf-16-le"), "line 1, column 2", "UTF-8"),
        ("# café\nmodel:\n  name: demo\n".encode("latin-1"), "line 1", "UTF-8"),
        (b"? [a]\n: 1\n", "line 1", "key: value"),
        (b"evaluation:\n  prompts: [What is it?, Why]\n", "line 2", "quotes"),
    ],
)
def test_fault_039_text_that_is_no_yaml_is_told_with_line_and_fix(tmp_path: Path, text: bytes, place: str, fix: str) -> None:
    error = refused(tmp_path, text)
    assert place in error.where
    assert fix in error.fix
    assert "\n" not in error.problem


@pytest.mark.parametrize(
    "change", [lambda t: b"\xef\xbb\xbf" + t, lambda t: t.replace(b"\n", b"\r\n"), lambda t: t.rstrip(b"\n")]
)
def test_fault_039_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path: Path, change: Any) -> None:
    assert load(tmp_path, change(R0.encode())) == load(tmp_path, R0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !!python/object/apply:os.system ['touch owned']\n", "tags (!!python/object/apply:os.system)"),
        ("model:\n  name: !!binary aGk=\n", "tags (!!binary)"),
        ("model: !!set {a, b}\n", "tags (!!set)"),
        ("model:\n  name: !mine x\n", "tags (!mine)"),
        ("model: &m {name: demo}\nlora: *m\n", "aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "aliases"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "{" * 5000, "nested too deep"),
        ("training:\n  max_steps: " + "9" * 5000, "a number of 5,000 digits"),
        ("# " + "x" * 50_000_000, "has 50,000,002 bytes"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
@pytest.mark.alone
def test_fault_040_yaml_that_could_do_harm_is_refused_at_once(
    tmp_path: Path, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    assert words in refused(tmp_path, text).problem
    assert time.process_time() - started < 2
    assert not (tmp_path / "owned").exists()


def test_fault_041_an_empty_config_asks_for_nothing(tmp_path: Path) -> None:
    for text in ("", "\n\n", "# nothing\n", "~\n", "{}\n"):
        assert load(tmp_path, text) == RunConfig()


@pytest.mark.parametrize(("text", "kind"), [("- model\n", "a list"), ("hello\n", "a single value"), ("42\n", "a single value")])
def test_fault_041_a_list_or_a_word_at_the_top_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    assert refused(tmp_path, text).problem == f"holds {kind} where sections are due"


def test_fault_041_a_file_that_is_none_is_told_with_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "training.yaml").write_text("")

    def told(path: str) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return caught.value

    assert "did you mean" in told(f"{tmp_path}/trainin.yaml").fix and "training.yaml" in told(f"{tmp_path}/trainin.yaml").fix
    assert told("/nowhere/cfg.yaml").problem == "no such config file"
    assert "training.yaml" in told(str(tmp_path)).fix
    assert told(str(tmp_path)).problem == "is a folder, not a config file"
    assert told("/dev/zero").problem == "is not a regular file"
    assert "File name too long" in told("a" * 5000).problem
    assert "null" in told("a\0b").problem
    assert told("training.max_steps").fix == "to set a knob write training.max_steps=VALUE"


def test_fault_042_a_secret_that_does_not_belong_here_is_not_repeated(tmp_path: Path) -> None:
    secret = "hf_" + "Q" * 34
    for text, override in ((f"model:\n  token: {secret}\n", ()), ("", (f"model.token={secret}",)), (f"hf_token: {secret}\n", ())):
        assert secret not in str(refused(tmp_path, text, *override))


def test_fault_044_the_command_line_wins_over_the_file_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text("training:\n  max_steps: 5\n  seed: 1\nlora:\n  r: 4\n")
    config, notes = load_config(path, ["training.max_steps=7", "seed=1", "lora.r=8"])
    assert (config.training.max_steps, config.training.seed, config.lora.r) == (7, 1, 8)
    assert notes == [
        f"training.max_steps is 7 from the command line, not 5 from {path} line 2",
        "seed is called training.seed here",
        f"lora.r is 8 from the command line, not 4 from {path} line 5",
    ]


def test_fault_044_the_command_line_must_not_contradict_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.seed is given twice: 1 and 2"):
        load_config(None, ["seed=1", "training.seed=2"])
    assert load_config(None, ["seed=1", "training.seed=1"])[0].training.seed == 1


def test_a_model_in_place_of_a_config_is_told_where_it_belongs() -> None:
    for name in ("tinyllama", "Qwen/Qwen3-0.6B"):
        with pytest.raises(ConfigError, match="no such config file") as caught:
            load_config(name)
        assert caught.value.fix == f"to name a model write --model {name}"


def test_a_fault_of_the_command_line_does_not_blame_the_file(tmp_path: Path) -> None:
    error = refused(tmp_path, "training:\n  max_steps: 5\n", "training.max_steps=0")
    assert error.where == "command line"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("data.train_file=[draft] #2: a.json", "data.train_file", "[draft] #2: a.json"),
        ("output.run_name=2024", "output.run_name", "2024"),
        ("output.run_name=null", "output.run_name", None),
        ("data.system_prompt=You are: kind # really", "data.system_prompt", "You are: kind # really"),
        ("data.system_prompt='quoted'", "data.system_prompt", "quoted"),
        ("lora.target-modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("training.max_steps=", "training.max_steps", None),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("training.packing=false", "training.packing", False),
    ],
)
def test_text_on_the_command_line_is_taken_as_it_is_written(override: str, path: str, value: Any) -> None:
    assert get(load_config(None, [override])[0], path) == value


@pytest.mark.parametrize("override", ["=3", "training", "training=3", "lora.r=[1", "model.name=\udcff", "x.y.z=1", "lora.r.s=1"])
def test_a_word_that_sets_nothing_is_a_config_error(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert caught.value.where == "command line" and caught.value.fix


# --- aliases and faces -------------------------------------------------------------------------------------

SPELLINGS = {  # of CONVENTIONS.md 4.2, as far as this version has the knob
    "model_name_or_path: demo": ("model.name", "demo"),
    "base_model: demo": ("model.name", "demo"),
    "cutoff_len: 512": ("model.max_length", 512),
    "sequence_len: 512": ("model.max_length", 512),
    "max_seq_length: 512": ("model.max_length", 512),
    "dataset: sample:chat": ("data.train_file", "sample:chat"),
    "dataset_name: sample:chat": ("data.train_file", "sample:chat"),
    "finetuning_type: full": ("method", "full"),
    "adapter: lora": ("method", "lora"),
    "lora_r: 8": ("lora.r", 8),
    "lora_rank: 8": ("lora.r", 8),
    "lora_alpha: 8": ("lora.alpha", 8),
    "lora_dropout: 0.2": ("lora.dropout", 0.2),
    "lora_target: [q_proj]": ("lora.target_modules", ["q_proj"]),
    "lora_target_modules: [q_proj]": ("lora.target_modules", ["q_proj"]),
    "per_device_train_batch_size: 2": ("training.batch_size", 2),
    "micro_batch_size: 2": ("training.batch_size", 2),
    "gradient_accumulation_steps: 2": ("training.gradient_accumulation_steps", 2),
    "num_train_epochs: 2": ("training.num_epochs", 2.0),
    "num_epochs: 2": ("training.num_epochs", 2.0),
    "epochs: 2": ("training.num_epochs", 2.0),
    "iters: 10": ("training.max_steps", 10),
    "lr: 1e-4": ("training.learning_rate", 1e-4),
    "lr_scheduler_type: linear": ("training.schedule", "linear"),
    "lr_scheduler: linear": ("training.schedule", "linear"),
    "warmup_ratio: 0.1": ("training.warmup_ratio", 0.1),
    "val_size: 0.1": ("data.validation_split", 0.1),
    "val_set_size: 0.1": ("data.validation_split", 0.1),
    "sample_packing: false": ("training.packing", False),
    "gradient_checkpointing: true": ("training.gradient_checkpointing", True),
    "early_stopping_patience: 2": ("training.early_stopping_patience", 2),
    "training: {num_train_epochs: 2}": ("training.num_epochs", 2.0),
    "lora: {rank: 8}": ("lora.r", 8),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_spelling_of_another_tool_is_taken_and_ours_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text(text)
    config, notes = load_config(path)
    knob, value = SPELLINGS[text]
    assert get(config, knob) == value
    assert len(notes) == 1 and notes[0].endswith(f"is called {knob} here")


@pytest.mark.parametrize(
    ("text", "knob", "value"),
    [
        ("use_4bit: true\nbnb_4bit_quant_type: fp4", "model.quantization", "fp4"),
        ("bnb_4bit_quant_type: fp4\nuse_4bit: true", "model.quantization", "fp4"),
        ("use_4bit: true\nbnb_4bit_quant_type: nf4", "model.quantization", "nf4"),
        ("use_4bit: false\nbnb_4bit_quant_type: fp4", "model.quantization", None),
        ("model:\n  bnb_4bit_quant_type: nf4\n  use_4bit: false", "model.quantization", None),
        ("bnb_4bit_quant_type: fp4\nload_in_8bit: false\nload_in_4bit: true", "model.quantization", "fp4"),
        ("bnb_4bit_quant_type: fp4\nload_in_8bit: false", "model.quantization", "fp4"),
        ("load_in_8bit: true\nbnb_4bit_quant_type: nf4", "model.quantization", "int8"),
        ("load_in_4bit: false\nbnb_4bit_quant_type: fp4\nload_in_8bit: true", "model.quantization", "int8"),
        ("quantization_bit: 4\nbnb_4bit_quant_type: fp4", "model.quantization", "fp4"),
        ("fp16: false\nbf16: true", "model.dtype", "bfloat16"),
        ("training: {fp16: true, bf16: false}", "model.dtype", "float16"),
        ("use_rslora: false\nuse_dora: true", "lora.variant", "dora"),
    ],
)
def test_a_switch_and_its_kind_go_together(tmp_path: Path, text: str, knob: str, value: Any) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text(text)
    config, notes = load_config(path)
    assert get(config, knob) == value
    off = [note for note in notes if "counts for nothing" in note]
    assert len(off) == (value is None)
    words = [line.strip().replace(": ", "=") for line in text.replace("model:\n", "").split("\n")]
    if "{" not in text:
        assert get(load_config(None, words)[0], knob) == value, "the command line too"


@pytest.mark.parametrize(
    "text",
    [
        "load_in_4bit: true\nload_in_8bit: true",
        "use_rslora: true\nuse_dora: true",
        "fp16: true\nbf16: true",
        "use_4bit: true\nmodel: {quantization: null}",
        "use_4bit: true\nmodel: {quantization: int8}",
        "bnb_4bit_quant_type: fp4\nmodel: {bnb_4bit_quant_type: nf4}",
    ],
)
def test_two_switches_that_are_both_on_contradict_each_other(tmp_path: Path, text: str) -> None:
    assert "is given twice" in refused(tmp_path, text).problem


def test_every_alias_stands_for_a_knob_and_is_no_knob_itself() -> None:
    assert set(ALIASES.values()) <= set(knobs())
    assert not set(ALIASES) & set(knobs())


SECTIONS = {path.rpartition(".")[0] for path in knobs()} - {""}


another_of = {int: 17, float: 0.25, str: "some-text"}


def another(path: str) -> Any:
    """A value that the knob takes and that is not its default."""
    field = knobs()[path]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return next(word for word in get_args(field.annotation) if word != field.default)
    for kind in kinds:
        if get_origin(kind) is Literal:
            return next(word for word in get_args(kind) if word != field.default)
    kind = kinds[0]
    if get_origin(kind) is list:
        return list(get_args(get_args(kind)[0])[:2]) or ["first", "second"]
    if get_origin(kind) is dict:
        return {"first": another_of[get_args(kind)[1]]}
    if kind is bool:
        return field.default is not True
    return another_of[kind]


@pytest.mark.parametrize("path", knobs())
def test_every_knob_means_the_same_through_yaml_terminal_and_python(path: str, tmp_path: Path) -> None:
    value = another(path)
    assert value != knobs()[path].default
    in_yaml = load(tmp_path, dump_yaml(tree_of(path, value)))
    written = dump_yaml({"v": value}).removeprefix("v:").strip()
    if isinstance(value, list):
        written = f"[{', '.join(value)}]"
    if isinstance(value, dict):
        written = f"{{{', '.join(f'{key}: {one}' for key, one in value.items())}}}"
    in_terminal = asked_config(_parser("train").parse_all([f"{path}={written}"]))
    in_python = RunConfig.model_validate(tree_of(path, value))
    assert get(in_python, path) == value
    assert in_yaml == in_terminal == in_python == changed(RunConfig(), {path: value})
    assert load(tmp_path, dump_yaml(in_python.asked())) == in_python, "what a run stores gives the run's config again"
    if path not in ("model.name", "data.train_file"):
        short = path.rpartition(".")[2]
        same = [other for other in knobs() if other.rpartition(".")[2] == short]
        trainer = QuickTrainer("demo", "sample:chat", **{short if len(same) == 1 else path: value})
        assert get(trainer.config, path) == value
    for flag, knob in FLAGS.items():
        if knob == path:
            assert asked_config(_parser("train").parse_all([flag, written])) == in_python


def test_names_in_python_may_be_short_and_are_corrected() -> None:
    assert knob_named("max_steps") == "training.max_steps"
    assert knob_named("lora_r") == "lora.r"
    assert knob_named("dropout") == "lora.dropout"
    with pytest.raises(ConfigError, match="unknown setting max_step") as caught:
        QuickTrainer("demo", "sample:chat", max_step=3)
    assert caught.value.fix == "did you mean max_steps?"


def test_a_wrong_value_in_python_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"training\.max_steps is 0, expected a whole number"):
        QuickTrainer("demo", "sample:chat", max_steps=0)
    with pytest.raises(ConfigError, match=r"lora\.r is 'many'"):
        changed(RunConfig(), {"lora.r": "many"})


def test_every_knob_is_read_by_the_engine() -> None:
    """An option that nothing reads would be accepted and ignored."""
    house = ROOT / "src/llm_finetune_kit"
    files = [path for path in house.rglob("*.py") if path.name not in ("config.py", "arguments.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    unread = [path for path in knobs() if not re.search(rf"(\.|\[\"){path.rpartition('.')[2]}\b(?!\s*=[^=])", text)]
    assert unread == []


def test_every_knob_says_what_it_takes_and_what_it_is_for() -> None:
    for path, field in knobs().items():
        assert str(field.description).endswith("."), path
        assert expected(path)


# --- fuzz --------------------------------------------------------------------------------------------------

WORDS = [
    "model",
    "name",
    "training",
    "lora",
    "r",
    "data",
    "demo",
    "1e-5",
    "no",
    "~",
    "null",
    "true",
    "-1",
    "1e400",
    ".nan",
    "012",
]
WORDS += [
    "''",
    '"',
    "'",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "\n",
    "\n  ",
    "\t",
    "#",
    "&a",
    "*a",
    "!!str",
    "!x",
    "|",
    ">",
    "?",
    "%",
    "@",
    "`",
    "---",
    "...",
    ",",
]
WORDS += [
    "\ufeff",
    "\0",
    "\x85",
    "\u2028",
    "é",
    "😀",
    "\r",
    "<<: ",
    "9" * 400,
    *ALIASES,
    *(path.rpartition(".")[2] for path in knobs()),
]


def test_fault_045_of_3000_broken_configs_none_gives_a_traceback(tmp_path: Path) -> None:
    seed = 20240
    dice = random.Random(seed)
    sources = [R0, *(re.sub(r" *#.*\n", "\n", path.read_text(encoding="utf-8")).replace("\n\n", "\n") for path in CONFIGS)]
    kept = refusals = 0
    for number in range(3000):
        text = mutated(dice, dice.choice(sources)) if number % 3 else made_up(dice)
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        words = [f"{dice.choice(list(knobs()))}={dice.choice(WORDS)}"] if number % 4 == 0 else []
        try:
            load(tmp_path, raw, *words)
            kept += 1
        except ConfigError as error:
            refusals += 1
            assert error.exit_code == 2 and error.fix and error.where, f"seed {seed}, number {number}: {error}"
        except BaseException as error:
            raise AssertionError(f"seed {seed}, number {number}: {raw[:300]!r} {words}") from error
    assert kept > 100 and refusals > 1000, (kept, refusals)


def mutated(dice: random.Random, text: str) -> str | bytes:
    """A sound config with some bytes, lines or words of it damaged."""
    for _ in range(dice.randint(1, 3)):
        way = dice.randrange(6)
        lines = text.split("\n")
        at = dice.randrange(len(lines))
        if way == 0:
            lines[at] = " " * dice.randrange(5) + lines[at]
        elif way == 1:
            lines[at:at] = [lines[dice.randrange(len(lines))]]
        elif way == 2:
            lines[at] = lines[at].partition(":")[0] + ": " + dice.choice(WORDS)
        elif way == 3:
            del lines[at]
        elif way == 4:
            cut = dice.randrange(len(text) + 1)
            lines = [text[:cut] + dice.choice(WORDS) + text[cut + dice.randrange(3) :]]
        else:
            raw = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
            for _ in range(dice.randint(1, 4)):
                raw[dice.randrange(len(raw))] = dice.randrange(256)
            return bytes(raw)
        text = "\n".join(lines) or "\n"
    return text


def made_up(dice: random.Random) -> str:
    return "".join(dice.choice(WORDS) + dice.choice(["", " ", ": ", "\n", "\n  "]) for _ in range(dice.randint(1, 40)))


def test_a_refusal_is_a_kit_error_that_a_face_can_print(tmp_path: Path) -> None:
    error = refused(tmp_path, "lora: {r: 0}")
    assert isinstance(error, KitError)
    head, fix = str(error).splitlines()
    assert re.fullmatch(r"error\[CONFIG-\d{3}\] \S+cfg.yaml line 1: lora.r is 0, expected a whole number from 1 to 1,024", head)
    assert fix.startswith("  fix:  ")


def test_changing_a_ready_value_needs_no_note() -> None:
    config, notes = load_config(None, ["output.run_name=mine"], {"output.run_name": "demo"})
    assert config.output.run_name == "mine" and notes == []
