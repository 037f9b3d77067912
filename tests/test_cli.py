"""The command line: fast, honest about what is wrong, quiet about what is not ours, and never hurt by a closed terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import statistics
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from faces import FINETUNE, HEAVY, ROOT, Done, answer, finetune, start
from llm_finetune_kit import __version__
from llm_finetune_kit.arguments import FLAGS
from llm_finetune_kit.cli import COMMANDS
from llm_finetune_kit.config import knobs
from llm_finetune_kit.errors import KitError
from llm_finetune_kit.terminal import folded

ERROR = re.compile(r"^error\[([A-Z]+)-(\d{3})\] (.+)$", re.MULTILINE)
ROWS = [{"prompt": f"Question {number}?", "response": f"Answer {number}."} for number in range(6)]


def jsonl(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- speed and imports -------------------------------------------------------------------------------------


@pytest.mark.alone
def test_help_comes_at_once_and_loads_nothing_heavy(tmp_path: Path) -> None:
    tries = [finetune(tmp_path, "--help", light=True) for _ in range(3)]
    assert all(done.code == 0 and done.err == "" for done in tries)
    assert statistics.median(done.work for done in tries) <= 0.5
    for command in COMMANDS:
        assert f"  {command} " in tries[0].out
    for flag in FLAGS:
        assert f"  {flag}" in tries[0].out
    assert max(map(len, tries[0].out.splitlines())) <= 120


# Fault: words of the command line, exit code, and what the error must say (place, then reason, then fix).
QUICK_FAULTS: dict[str, tuple[list[str], int, list[str]]] = {
    "no_such_file": (
        ["--model", "demo", "--data", "trian.jsonl"],
        3,
        ["trian.jsonl: there is no such file", "did you mean train.jsonl"],
    ),
    "empty_file": (["--model", "demo", "--data", "empty.jsonl"], 3, ["empty.jsonl: the file is empty (0 bytes)", "fix:"]),
    "broken_json": (["--model", "demo", "--data", "broken.jsonl"], 3, ["broken.jsonl line 4", "fix:"]),
    "missing_column": (
        ["--model", "demo", "--data", "column.jsonl"],
        3,
        ["column.jsonl line 1: ", "mean 'prompt' instead of 'promt'?"],
    ),
    "null_output": (["--model", "demo", "--data", "null.jsonl"], 3, ["null.jsonl line 3, field response: is null", "fix:"]),
    "unknown_key": (
        ["key.yaml"],
        2,
        ["key.yaml line 4: unknown setting training.learning_rat", "did you mean training.learning_rate?"],
    ),
    "wrong_type": (["type.yaml"], 2, ["type.yaml line 4: training.max_steps is 'many', expected a whole number", "fix:"]),
    "out_of_range": (["range.yaml"], 2, ["range.yaml line 4: lora.dropout is 1.5, expected a number from 0 to 0.9", "fix:"]),
    "unknown_model": (
        ["--model", "gtp2", "--data", "train.jsonl"],
        4,
        ["model.name: no model is called gtp2", "did you mean gpt2"],
    ),
    "nothing_to_resume": (
        ["resume", "mine"],
        2,
        ["outputs: no run is called mine", "holds no runs; start one with `finetune train`"],
    ),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sound data file and many that are not."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "train.jsonl").write_text(jsonl(ROWS))
    (folder / "empty.jsonl").write_text("")
    lines = jsonl(ROWS).splitlines(keepends=True)
    (folder / "broken.jsonl").write_text("".join([*lines[:3], '{"prompt": "cut off\n', *lines[3:]]))
    (folder / "column.jsonl").write_text(jsonl([{"promt": "a", "response": "b"}] * 3))
    (folder / "null.jsonl").write_text(jsonl([*ROWS[:2], {"prompt": "a", "response": None}, *ROWS[2:]]))
    head = "model: {name: demo}\ndata: {train_file: train.jsonl}\n"
    (folder / "key.yaml").write_text(f"{head}training:\n  learning_rat: 1e-4\n")
    (folder / "type.yaml").write_text(f"{head}training:\n  max_steps: many\n")
    (folder / "range.yaml").write_text(f"{head}lora:\n  dropout: 1.5\n")
    return folder


@pytest.mark.parametrize("fault", QUICK_FAULTS)
@pytest.mark.alone
def test_a_fault_is_told_within_a_second_and_without_torch(fault: str, faulty: Path) -> None:
    words, code, parts = QUICK_FAULTS[fault]
    tries = [finetune(faulty, *words, light=True) for _ in range(2)]
    for done in tries:
        assert "HEAVY IMPORT" not in done.err
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        assert len(ERROR.findall(done.err)) == 1
        at = 0
        for part in parts:
            assert part in done.err[at:], f"{part!r} is not told: {done.err}"
            at = done.err.index(part, at)
        assert re.search(r"^  fix:  \S", done.err, re.MULTILINE)
    assert statistics.median(done.work for done in tries) <= 1.0
    assert not (faulty / "outputs").exists(), "nothing is written before the data is sound"


def test_the_wall_of_these_tests_does_stop_torch(tmp_path: Path) -> None:
    for package in ("torch", "transformers", "huggingface_hub"):
        assert package in HEAVY
        assert start([sys.executable, "-c", f"import {package}"], tmp_path, light=True).code == 99


def test_fault_022_a_prompt_longer_than_max_length_stops_the_run(tmp_path: Path, stories: Path) -> None:
    """The tokenizer is needed, and loading it loads torch: it takes little more work than that."""
    (tmp_path / "long.jsonl").write_text(jsonl([*ROWS, {"prompt": "Why? " * 60, "response": "Because."}]))
    words = ["--model", str(stories), "--data", "long.jsonl", "--max-length", "48", "data.validation_split=0.2"]
    load = "from pathlib import Path; from llm_finetune_kit.models.tokenizer import load_tokenizer; load_tokenizer(Path({!r}))"
    loaded = start([sys.executable, "-c", load.format(str(stories))], tmp_path)
    done = finetune(tmp_path, *words)
    assert done.code == 3 and "Traceback" not in done.err
    assert loaded.code == 0 and done.work <= 1.5 * loaded.work
    assert "error[DATA-135] long.jsonl: 1 of 6 examples" in done.err and "(long.jsonl line 7)" in done.err
    assert "their prompts alone reach max_length 48" in done.err
    assert "fix:  raise model.max_length above 48, or train without them: data.on_bad_rows=drop" in done.err
    assert not (tmp_path / "outputs").exists()


def test_fault_022_a_run_that_would_learn_nothing_does_not_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.jsonl").write_text(jsonl([{"prompt": "Why? " * 60, "response": "Because."}] * 6))
    code, _, err = answer(capsys, "--model", str(stories), "--data", "long.jsonl", "--max-length", "48")
    assert code == 3
    assert "error[DATA-134] long.jsonl: 100% of what is to be learned lies beyond max_length 48" in err
    assert "fix:  raise model.max_length" in err and "the longest example has " in err
    assert not (tmp_path / "outputs").exists()


# --- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], ["there is no command trian", "did you mean `finetune train`?"]),
        (["qwertz"], ["there is no command qwertz", "commands: train, demo, resume"]),
        (["--modle", "demo"], ["unknown option --modle", "did you mean --model?"]),
        (["--max_stepz=3"], ["unknown option --max-stepz", "did you mean --max-steps?"]),
        (["--lr"], ["--lr needs a value", "write training.learning_rate=VALUE"]),
        (["--on-bad-rows=stop"], ["unknown option --on-bad-rows", "write data.on_bad_rows=VALUE"]),
        (["--model", "demo", "--lr=1e-3", "--learning-rate", "2e-3"], ["training.learning_rate is given twice"]),
        (["--model", "demo", "--method", "qlora"], ["method is 'qlora'", "model.quantization=nf4"]),
        (["--data"], ["--data needs a value", "finetune train --help"]),
        (["generate", "demo"], ["--prompt is missing", 'finetune generate outputs/final --prompt "']),
        (["generate", "demo", "--promt", "x"], ["unknown option --promt", "did you mean --prompt?"]),
        (["generate", "--prompt", "x"], ["no model is named"]),
        (["generate", "demo", "--prompt", "x", "--seed", "many"], ["--seed", "finetune generate --help"]),
        (["eval", "demo"], ["--data is missing", "--data sample:chat"]),
        (["models", "gpt2"], ["unexpected word gpt2"]),
        (["resume", "a", "b"], ["one run at a time, and a and b are named"]),
        (["train", "a.yaml", "b.yaml"], ["more than one config file: a.yaml, b.yaml"]),
        (["train", "training.max_steps"], ["no such config file", "write training.max_steps=VALUE"]),
        (["train", "x.y=1"], ["command line: unknown setting x.y"]),
        (["--max-steps", "3"], ["no model is named"]),
        (["--model", "demo"], ["no training data is named"]),
        (["resume"], ["outputs: no run is here", "finetune train"]),
        (["generate", "outputs/final", "--prompt", "x"], ["no run has a final", "train first"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_wrong_word_is_told_with_the_right_one(
    words: list[str], told: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = answer(capsys, *words)
    assert code == 2 and out == ""
    assert len(ERROR.findall(err)) == 1 and "usage:" not in err
    for part in told:
        assert part in err


def test_flags_of_other_tools_are_taken_and_their_names_told(capsys: pytest.CaptureFixture[str]) -> None:
    from llm_finetune_kit.arguments import asked_config
    from llm_finetune_kit.cli import _parser

    words = ["--lr", "1e-3", "--warmup-steps=8", "--load-in-4bit", "--bf16", "true", "--per-device-train-batch-size", "2"]
    config = asked_config(_parser("train").parse_all([*words, "model.name=demo"]))
    assert (config.training.learning_rate, config.training.warmup_steps, config.training.batch_size) == (1e-3, 8, 2)
    assert (config.model.name, config.model.quantization, config.model.dtype) == ("demo", "nf4", "bfloat16")
    assert "note: lr is called training.learning_rate here" in capsys.readouterr().err


def test_the_version_and_the_help_of_every_command_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--version") == (0, f"finetune {__version__}\n", "")
    for words in ([], ["help"], ["-h"], ["--help"]):
        code, out, _ = answer(capsys, *words)
        assert code == 0 and out.startswith("usage: finetune [command]")
    for command in COMMANDS:
        for words in ([command, "--help"], ["help", command]):
            code, out, _ = answer(capsys, *words)
            assert code == 0 and out.startswith(f"usage: finetune {command}") and COMMANDS[command] in re.sub(r"\s+", " ", out)


def test_messages_name_only_commands_that_exist() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".jinja", ".md")]
    texts += [path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
    command = re.compile(r"(?:^|[`\"' >])finetune ([a-z]+)(?= |`|\"|'|\n)", re.MULTILINE)
    named = {word for text in texts for word in command.findall(text)}
    assert {"resume", "train", "generate"} <= named
    assert named <= set(COMMANDS)


def test_flags_mean_knobs_and_may_be_written_with_underscores(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg.yaml").write_text(
        f"model: {{name: {stories}}}\ndata: {{train_file: 'sample:chat'}}\ntraining: {{max_steps: 50}}\n"
    )
    words = ["cfg.yaml", "--max_steps", "7", "lora.r=4", "--batch_size=2", "training.gradient-accumulation_steps=3", "--json"]
    code, out, err = answer(capsys, "plan", *words)
    assert code == 0
    plan = json.loads(out)
    assert plan["steps"] == 7 and plan["examples_per_step"] == 6
    assert plan["config"]["lora"]["r"] == 4
    assert set(FLAGS.values()) <= set(knobs())
    assert "note: training.max_steps is 7 from the command line, not 50 from cfg.yaml line 3" in err
    assert not (tmp_path / "outputs").exists()


def test_a_config_file_alone_is_a_training_and_dry_run_only_plans(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg.yaml").write_text(f"model: {{name: {stories}}}\ndata: {{train_file: 'sample:chat'}}\n")
    code, out, err = answer(capsys, "cfg.yaml", "--dry-run", "--max-steps=3")
    assert code == 0
    assert "3 steps of 16 examples" in out and "model.dtype" in out and "memory" in out
    assert "reading sample:chat" in err
    assert not (tmp_path / "outputs").exists()


def test_models_are_listed_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "models", "--json")
    models = {model["name"]: model for model in json.loads(out)}
    assert code == 0 and models["gpt2"]["hub_id"] == "openai-community/gpt2" and models["gpt2"]["fits"] == "LoRA"
    code, out, _ = answer(capsys, "models")
    for name, model in models.items():
        assert re.search(rf"^{re.escape(name)} .*{re.escape(model['hub_id'] or 'in the package')}", out, re.MULTILINE)


# --- one real run, its output piped into `head` ------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A folder in which `finetune ... | head -1` has trained, and what that said."""
    model = ROOT.parent / "shared/data/models/stories260K-hf"
    if not model.is_dir():
        pytest.skip("the folder with real models is not here")
    folder = tmp_path_factory.mktemp("trained")
    words = [*FINETUNE, "--model", str(model), "--data", "sample:chat", "--max-steps", "4", "--lora-r=4", "--run-name", "mine"]
    command = f"set -o pipefail; {shlex.join([*words, 'evaluation.generation.max_new_tokens=12'])} | head -1"
    return folder, start(["bash", "-c", command], folder)


def test_fault_066_a_reader_that_leaves_does_not_stop_a_run(trained: tuple[Path, Done]) -> None:
    folder, done = trained
    assert done.code == 0, done.err
    assert done.out.startswith("Plan for ") and done.out.count("\n") == 1
    assert (folder / "outputs/mine/final/adapter_model.safetensors").is_file()
    assert (folder / "outputs/mine/report.html").is_file(), "also what comes after the last print is done"


def test_a_run_says_what_it_does_and_libraries_say_nothing(trained: tuple[Path, Done]) -> None:
    _, done = trained
    lines = done.err.splitlines()
    starts = [
        "reading sample:chat",
        "planning",
        "run folder outputs/mine",
        "loading ",
        "step 0: held-out loss",
        "training 4 steps",
    ]
    assert [line for line in lines if line.startswith(tuple(starts))][: len(starts)] == [
        next(line for line in lines if line.startswith(start)) for start in starts
    ]
    assert any(re.fullmatch(r"step 4/4  epoch \d+\.\d\d  loss \d.*  lr .*  grad norm .* tokens/s", line) for line in lines)
    ours = (*starts, "note: ", "step ", "saved final/", "going back: ", "answering 3 sample prompts", "comparing base and tuned")
    ours += ("warning: 4 of 4 answers were cut at 12 tokens", "  fix: set evaluation.generation.max_new_tokens=")
    assert [line for line in lines if not line.startswith(ours)] == []
    assert "\x1b" not in done.err and "\r" not in done.err


def test_a_run_answers_and_is_measured(
    trained: tuple[Path, Done], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained[0])
    for model in ("outputs/mine", "outputs/final", "outputs/checkpoint-4"):
        code, out, err = answer(capsys, "generate", model, "--prompt", "What are your hours?", "--max-new-tokens", "8")
        err = re.sub(r"note: \.\.\. \(cut at 8 tokens.*\n", "", err)
        kept = f"outputs/mine/{Path(model).name}"
        assert code == 0 and out.strip()
        assert err == ("" if model == "outputs/mine" else f"note: {model} means {kept}\n")
    code, out, _ = answer(capsys, "generate", "--model-path", "outputs/final", "--prompt", "Hi", "--max_new_tokens=4", "--json")
    assert json.loads(out).keys() == {"prompt", "answer"}
    code, out, err = answer(capsys, "eval", "outputs/mine", "--data", "sample:chat", "--json")
    found = json.loads(out)
    assert code == 0 and err == ""
    assert found["tuned"]["loss"] < found["base"]["loss"], "four steps on these very rows must help"
    code, out, _ = answer(capsys, "eval", "outputs/mine", "-d", "sample:chat")
    assert re.search(r"^tuned +[\d.]+ +[\d.]+ +[\d.]+ +20 ", out, re.MULTILINE)


def test_a_name_that_is_no_run_is_told_with_those_that_are(
    trained: tuple[Path, Done], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained[0])
    code, _, err = answer(capsys, "generate", "outputs/mien", "--prompt", "x")
    assert code == 2 and "no run is called mien" in err and "did you mean mine?" in err
    code, _, err = answer(capsys, "generate", "outputs/checkpoint-1000", "--prompt", "x")
    assert code == 2 and "no run has a checkpoint-1000" in err and "outputs/mine/final" in err
    code, _, err = answer(capsys, "resume")
    assert code == 2 and "no unfinished run" in err and "finetune resume outputs/mine --max-steps N" in err
    code, _, err = answer(capsys, "resume", "mine", "--max-steps", "0")
    assert code == 2 and len(ERROR.findall(err)) == 1


# --- how it looks ------------------------------------------------------------------------------------------

REPLAY = """\
import sys
from pathlib import Path
from llm_finetune_kit.events import Stage
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.terminal import Terminal

with Terminal() as terminal:
    for event in RunFolder(Path(sys.argv[1])).replay():
        terminal(event)
        if isinstance(event, Stage) and event.name == "data":
            terminal(Stage("run", sys.argv[1]))
"""


def screen(command: list[str], folder: Path, environment: dict[str, str], columns: int = 80) -> str:
    """All that a command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    here = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT / "src"), **environment}
    child = subprocess.Popen(command, cwd=folder, env=here, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while block := os.read(ours, 1 << 16):
            text += block
    except OSError:  # Linux reports the closed terminal in this way
        pass
    assert child.wait(timeout=60) == 0, text.decode()
    os.close(ours)
    return text.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, 60, 120])
def test_a_run_fits_a_terminal_and_leaves_no_gaps(columns: int, trained: tuple[Path, Done]) -> None:
    shown = screen([sys.executable, "-c", REPLAY, "outputs/mine"], trained[0], {"NO_COLOR": "1"}, columns)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown), "NO_COLOR is obeyed"
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown)
    last = [line.rpartition("\r")[2] for line in plain.split("\n")]
    assert [line for line in last if len(line) > columns] == []
    assert "\n\n\n" not in "\n".join(line.rstrip() for line in last)
    text = "\n".join(last)
    for words in ("Plan for ", "training.learning_rate", "100%|", "4/4 [", "before ", "after ", "wanted ", "held-out rows"):
        assert words in text, words
    assert "all steps done: 4 steps, " in text
    assert text.rstrip().split("\n")[-1].startswith("try it") or "try it" in text[-300:]
    assert "outputs/mine/report.html" in text
    assert "…" not in text.partition("prompt ")[0], "nothing of the plan is cut off"


def test_colours_are_used_where_they_are_welcome(trained: tuple[Path, Done]) -> None:
    environment = {"NO_COLOR": ""}
    assert "\x1b[36m" in screen([sys.executable, "-c", REPLAY, "outputs/mine"], trained[0], environment)


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from llm_finetune_kit.terminal import print_pairs, print_table

    print_table(("name", "value"), [("[bold]x[/bold]", "[q_proj]"), (":smile:", "a" * 200)])
    print_pairs([("[red]label", "it's [not] markup :tada:", "")])
    out = capsys.readouterr().out
    for words in ("[bold]x[/bold]", "[q_proj]", ":smile:", "[red]label", "it's [not] markup :tada:"):
        assert words in out
    assert out.replace("\n", "").count("a" * 50) >= 2


@pytest.mark.parametrize("ending", ["| head -1", "| true", ">&-", "2>&-"])
def test_output_that_goes_nowhere_is_no_fault(ending: str, tmp_path: Path) -> None:
    command = " ".join(FINETUNE)
    done = start(["bash", "-c", f"set -o pipefail; {command} models {ending}"], tmp_path)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err and "Exception ignored" not in done.err


@pytest.mark.parametrize("words", ["models", "models --json"])
def test_output_that_finds_no_room_is_told(words: str, tmp_path: Path) -> None:
    done = start(["bash", "-c", f"{' '.join(FINETUNE)} {words} > /dev/full"], tmp_path)
    assert done.code == 5 and "the disk is full" in done.err and "Exception ignored" not in done.err


def test_letters_that_the_terminal_does_not_know_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "façade.yaml").write_text("lora: {r: 0}")
    done = finetune(tmp_path, "façade.yaml", environment={"PYTHONIOENCODING": "ascii"}, light=True)
    assert done.code == 2 and "ade.yaml line 1: lora.r is 0" in done.err


def test_a_fault_of_ours_says_so_and_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> int:
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr("llm_finetune_kit.cli_machine.models_command", broken)
    code, _, err = answer(capsys, "models")
    assert code == 70
    assert "error[BUG-001] RuntimeError: the roof fell in" in err and "Traceback" not in err
    log = Path(err.rsplit(" ", 1)[1].strip())
    assert "the roof fell in" in log.read_text() and "Traceback" in log.read_text()
    log.unlink()


def test_long_errors_are_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    error = KitError(1, "a problem of " + "many words " * 12, where="somewhere", why="because " * 20, fix="/a/path/" + "x" * 90)
    assert folded(error) == str(error)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("llm_finetune_kit.terminal.width", lambda *_: 60)
    lines = folded(error).split("\n")
    assert max(len(line) for line in lines if "/a/path" not in line) <= 60
    assert any(line.endswith("/a/path/" + "x" * 70 + "…") or "x" * 70 in line for line in lines), "a path is never broken"
    assert " ".join(" ".join(lines).split()) == " ".join(str(error).split())
