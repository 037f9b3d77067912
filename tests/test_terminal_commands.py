"""init, explain, chat, completion, help and JSON: the commands that teach and those that look, tried as a user would."""

from __future__ import annotations

import inspect
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faces import FINETUNE, ROOT, answer
from llm_finetune_kit import cli_explain, cli_runs
from llm_finetune_kit.cli import COMMANDS, main
from llm_finetune_kit.cli_completion import suggestions
from llm_finetune_kit.cli_data import COMMANDS as DATA_COMMANDS
from llm_finetune_kit.cli_evaluate import checked_model
from llm_finetune_kit.config import ALIASES, GenerationSection, RunConfig, knobs
from llm_finetune_kit.data.questions import questions
from llm_finetune_kit.errors import DataError, Interrupted
from llm_finetune_kit.events import Planned, Stepped
from llm_finetune_kit.left_open import LEFT_OPEN
from llm_finetune_kit.runs import Standing, find_result
from llm_finetune_kit.settings import load_config
from llm_finetune_kit.terminal import Terminal, print_comparison
from llm_finetune_kit.trainers import QuickTrainer

SHORT = {"evaluation.generation.max_new_tokens": 4, "evaluation.prompts": ["Hi"], "evaluation.compare": False}


# --- init --------------------------------------------------------------------------------------------------


def test_the_config_of_init_asks_for_two_things_and_explains_all_others(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = answer(capsys, "init", "mine.yaml", "--model", "gpt2", "--data", "train.jsonl")
    assert code == 0 and "finetune train mine.yaml" in out
    text = (tmp_path / "mine.yaml").read_text()
    config, notes = load_config("mine.yaml")
    assert config.asked() == {"model": {"name": "gpt2"}, "data": {"train_file": "train.jsonl"}} and notes == []
    for path, knob in knobs().items():
        assert re.search(rf"^ *#?{path.rpartition('.')[2]}:", text, re.MULTILINE), path
        assert " ".join(knob.description.split()[:3]) in re.sub(r"\n *# ", " ", text)
    (tmp_path / "all.yaml").write_text(re.sub(r"^( *)#(\w+:)", r"\1\2", text, flags=re.MULTILINE))
    assert load_config("all.yaml")[0] == config, "the lines that are off hold the defaults"
    assert max(map(len, text.splitlines())) <= 120


def test_init_replaces_nothing_and_prints_for_a_dash(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert answer(capsys, "init")[0] == 0
    (tmp_path / "finetune.yaml").write_text("mine: true\n")
    code, _, err = answer(capsys, "init")
    assert code == 2 and "error[USAGE-032] finetune.yaml: exists already" in err and "--overwrite" in err
    assert (tmp_path / "finetune.yaml").read_text() == "mine: true\n"
    assert answer(capsys, "init", "--overwrite")[0] == 0
    assert answer(capsys, "init", "-")[1] == (tmp_path / "finetune.yaml").read_text()
    code, out, _ = answer(capsys, "plan", "finetune.yaml", "--json")
    assert code == 0 and json.loads(out)["config"]["model"]["name"] == "demo", "it runs as it stands"
    code, _, err = answer(capsys, "init", "other.yaml", "--model", "gtp2")
    assert code == 4 and "did you mean gpt2" in err and not (tmp_path / "other.yaml").exists()
    assert answer(capsys, "init", "nowhere/mine.yaml")[0] == 5


# --- explain -----------------------------------------------------------------------------------------------


def test_what_is_left_open_is_told_for_every_knob_without_a_default() -> None:
    assert set(LEFT_OPEN) == {path for path, knob in knobs().items() if knob.default is None}


@pytest.mark.parametrize("path", knobs())
def test_the_spellings_of_a_knob_mean_the_same(path: str, tmp_path: Path) -> None:
    """What `explain` shows for the terminal, YAML and Python gives one and the same config."""
    import shlex

    told = cli_explain.setting(path)
    base = {"model.name": "demo", "data.train_file": "train.jsonl"}
    (word,) = shlex.split(told["word"])
    by_word = load_config(None, [word], {name: value for name, value in base.items() if name != path})[0]
    (tmp_path / "one.yaml").write_text(told["yaml"] + "\n")
    by_yaml = load_config(tmp_path / "one.yaml")[0].with_values({name: value for name, value in base.items() if name != path})
    names = {"QuickTrainer": QuickTrainer, "model": "demo", "data": "train.jsonl"}
    by_python = eval(told["python"], names).config
    assert by_word == by_yaml == by_python
    assert by_word != RunConfig().with_values(base) or path == "data.train_file", "the example differs from the default"
    assert told["means"] == knobs()[path].description


def test_explain_finds_a_knob_by_all_its_names(capsys: Any) -> None:
    for word in ("learning_rate", "training.learning_rate", "--learning-rate", "lr", "training.lr"):
        code, out, _ = answer(capsys, "explain", "--json", word)
        assert code == 0 and json.loads(out)["setting"] == "training.learning_rate", word
    for alias, path in ALIASES.items():
        assert path in cli_explain._paths(alias, alias)
    assert [one["setting"] for one in json.loads(answer(capsys, "explain", "threads", "--json")[1])] == [
        "data.threads",
        "training.threads",
    ]
    out = answer(capsys, "explain", "load_in_4bit")[1]
    for words in ("model.quantization", "nf4, fp4 or int8", "load_in_4bit: true is nf4", "left open", "on resume"):
        assert words in out


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trainig.max_step", "training.max_steps"),
        ("lora_rnk", "lora.r"),
        ("DATA-999", "explain DATA"),
        ("qqqq", "sections"),
        ("qlora", "nf4"),
    ],
)
def test_explain_says_what_may_have_been_meant(word: str, hint: str, capsys: Any) -> None:
    code, out, err = answer(capsys, "explain", word)
    assert code == 2 and out == "" and "USAGE-031" in err and hint in err


def test_explain_tells_errors_and_lists(capsys: Any) -> None:
    for word in ("DATA-004", "data-4", "error[DATA-004]", "DATA4"):
        out = answer(capsys, "explain", word)[1]
        assert out.startswith("DATA-004\nA field is null.") and "on_bad_rows" in out and "exit code  3" in out
    assert json.loads(answer(capsys, "explain", "STOP-015", "--json")[1])["exit_code"] == 143
    assert "MACHINE-020" in answer(capsys, "explain", "errors")[1]
    assert "USAGE-001" in answer(capsys, "explain", "usage")[1]
    out = answer(capsys, "explain")[1]
    for section in ("model", "lora", "training", "evaluation.generation", "output"):
        assert re.search(rf"^{re.escape(section)} ", out, re.MULTILINE)
    assert "warmup_ratio" in answer(capsys, "explain", "training")[1]


# --- help, JSON, completion --------------------------------------------------------------------------------

ALL = [*([name] for name in COMMANDS), *(["data", name] for name in DATA_COMMANDS)]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_is_a_page_of_a_manual(words: list[str], capsys: Any) -> None:
    code, out, err = answer(capsys, *words, "--help")
    assert code == 0 and err == "" and out == answer(capsys, "help", *words)[1]
    assert out.startswith(f"usage: finetune {' '.join(words)}")
    assert max(map(len, out.splitlines())) <= 80
    examples = re.findall(r"^  (?:.*\| |eval \"\$\()?finetune ([^#]+)", out.partition("\nexamples:\n")[2], re.MULTILINE)
    assert examples, "every command shows how it is used"
    if words != ["data"]:
        assert re.search(r"\n\n[A-Z`][^\n]{30,}", out), "and says in a paragraph what it does"


def test_the_page_of_commands_is_that_of_the_program() -> None:
    """docs/commands.md has every command, its help as it is now, and an example that was run."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import docs_commands
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    text = docs_commands.PAGE.read_text(encoding="utf-8")
    printed = docs_commands.kept(text)
    assert text == docs_commands.page(printed), "renew it: python scripts/docs_commands.py"
    assert set(printed) == set(docs_commands.SHOWN) and all(printed.values())
    assert not re.search(r"Traceback|BUG-001|^error\[", text, re.MULTILINE)


def test_the_overview_fits_80_columns_and_tells_exit_codes(capsys: Any) -> None:
    out = answer(capsys, "--help")[1]
    assert max(map(len, out.splitlines())) <= 80
    for code in (0, 2, 3, 4, 5, 6, 7, 70, 130, 143):
        assert re.search(rf"^  {code} +\w", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("finetune pl", ["plan"]),
        ("finetune --max-st", ["--max-steps"]),
        ("finetune generate --max", ["--max-new-tokens"]),
        ("finetune data pre", ["preview"]),
        ("finetune data check --fi", ["--fix"]),
        ("finetune --model tinyl", ["tinyllama"]),
        ("finetune chat smollm2-1", ["smollm2-1.7b", "smollm2-135m"]),
        ("finetune train training.schedule=c", ["training.schedule=constant", "training.schedule=cosine"]),
        ("finetune plan lora.al", ["lora.alpha="]),
        ("finetune --method f", ["full"]),
        ("finetune eval demo --dtype b", ["bfloat16"]),
        ("finetune explain DATA-00", [f"DATA-00{number}" for number in range(1, 10)]),
        ("finetune help exp", ["explain"] + ["export"] * ("export" in COMMANDS)),
        ('finetune generate demo --prompt "half a wo', []),
        ("finetune models --on RTX30", ["RTX3060", "RTX3070", "RTX3080", "RTX3090"]),
    ],
)
def test_the_words_that_could_follow(line: str, among: list[str]) -> None:
    assert suggestions(line) == among


def test_bash_completes_for_real(tmp_path: Path) -> None:
    """A real interactive bash, and the TAB key."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "finetune"
    script.write_text(f'#!/bin/bash\nPYTHONPATH={ROOT / "src"} exec {" ".join(FINETUNE)} "$@"\n')
    script.chmod(0o755)
    (tmp_path / "rc").write_text('PS1="$ "\neval "$(finetune completion bash)"\nbind "set bell-style none"\n')
    place = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TERM": "dumb"}
    child, screen = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--noprofile", "--rcfile", "rc", "-i"], place)
    try:
        said = _until(screen, "$ ")
        for typed, became in (("finetune comp", "compare"), ("finetune train training.schedule=cos", "training.schedule=cosine")):
            os.write(screen, typed.encode())
            said = _until(screen, typed)
            os.write(screen, b"\t")
            wanted = became.rpartition("=")[2][3 if "=" in became else 4 :]
            said = _until(screen, "" if typed.endswith("comp") else wanted)
            if typed.endswith("comp"):  # two words fit: both are shown after another TAB
                os.write(screen, b"\t")
                said = _until(screen, "completion")
            assert wanted in said
            os.write(screen, b"\x15")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(screen)


def _until(screen: int, text: str, seconds: float = 60) -> str:
    """What a terminal shows up to where it has shown `text`."""
    said, end = "", time.monotonic() + seconds
    while text not in said or not text:
        ready = select.select([screen], [], [], 0.2 if not text else max(0.0, end - time.monotonic()))[0]
        if not ready:
            assert not text, f"{text!r} never came: {said!r}"
            return said
        said += os.read(screen, 1 << 16).decode(errors="replace")
    return said


# --- one run for what works on runs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of the demo model, stopped after its first step by SIGTERM and then gone on with."""
    folder = tmp_path_factory.mktemp("terminal")
    before = Path.cwd()
    os.chdir(folder)
    patch = pytest.MonkeyPatch()
    told = Terminal._stepped
    patch.setattr(Terminal, "_stepped", lambda self, event: (told(self, event), os.kill(os.getpid(), signal.SIGTERM)))
    settings: dict[str, Any] = {**SHORT, "max_steps": 2, "run_name": "mine", "batch_size": 2, "gradient_accumulation_steps": 1}
    try:
        with pytest.raises(Interrupted) as stopped:
            QuickTrainer("demo", "sample:chat", **settings).train()
        (folder / "stopped").write_text(str(stopped.value))
        (folder / "depth").write_text(str(len(stopped.traceback)))
        patch.undo()
        yield folder
    finally:
        patch.undo()
        os.chdir(before)


def test_a_signal_in_python_says_what_was_saved_without_a_long_traceback(place: Path) -> None:
    assert "stopped after step 1 of 2, and saved" in (place / "stopped").read_text()
    assert "go on with: finetune resume" in (place / "stopped").read_text()
    assert int((place / "depth").read_text()) <= 4, "this test, train(), and the door to the engine"


@pytest.fixture(scope="module")
def tuned(place: Path) -> str:
    """The run, gone on with to its end."""
    assert main(["resume", "mine"]) == 0
    return "outputs/mine"


def test_a_plan_of_a_run_that_goes_on_tells_what_is_left(tuned: str, capsys: Any) -> None:
    from llm_finetune_kit.folder import RunFolder

    planned = next(event for event in RunFolder(Path(tuned)).replay() if isinstance(event, Planned))
    shown = []
    for done in (None, 1):
        Terminal(goes_on=done)(planned)
        shown.append(capsys.readouterr().out)
    assert re.search(r"^time +about", shown[0], re.MULTILINE) and "1 of 2 steps are left" not in shown[0]
    assert re.search(r"^time left +about", shown[1], re.MULTILINE) and "1 of 2 steps are left" in shown[1]


def test_a_run_too_short_to_be_profiled_is_told_with_its_plan(tuned: str, capsys: Any) -> None:
    from llm_finetune_kit.folder import RunFolder

    planned = next(event for event in RunFolder(Path(tuned)).replay() if isinstance(event, Planned))
    plan = planned.plan | {
        "config": planned.plan["config"] | {"training": planned.plan["config"]["training"] | {"profile": True}}
    }
    told = {}
    for steps in (3, 4):
        Terminal()(replace(planned, plan=plan | {"steps": steps}))
        told[steps] = "nothing will be profiled" in capsys.readouterr().err
    assert told == {3: True, 4: False}


def test_a_missing_interval_is_explained_below_the_table(capsys: Any) -> None:
    row = {"name": "rougeL", "label": "ROUGE-L", "base": 0.1, "tuned": 0.2, "difference": 0.1, "outcome": "none"}
    rest = {
        "rows": {"answered": 4, "of": 4, "why": "all"},
        "sentence": "So it is.",
        "general": row | {"low": 0, "high": 0, "sentence": ""},
    }
    for low, explained in ((None, True), (0.0, False)):
        print_comparison(rest | {"metrics": [row | {"low": low, "high": low}]})
        assert ("no interval, as there are too few answers" in capsys.readouterr().out) is explained


def test_one_speed_is_shown(tuned: str, capsys: Any) -> None:
    """Every line says the mean since the beginning, so the last one says what the summary does."""
    terminal = Terminal()
    for step in (1, 2):
        terminal(Stepped(step, 2, 1.0, 1.0, 0.1, 1.0, tokens=100 * step, target_tokens=50, seconds=1.0))
    assert [re.findall(r"([\d,]+) tokens/s", line) for line in capsys.readouterr().err.splitlines()] == [["100"], ["150"]]


def test_read_only_commands_print_json(tuned: str, capsys: Any) -> None:
    run = [tuned, "--dtype", "float32"]
    lines = [
        ["runs"],
        ["runs", "show", "mine"],
        ["models"],
        ["doctor"],
        ["plan", "--model", "demo", "--data", "sample:chat"],
        ["explain"],
        ["explain", "errors"],
        ["data", "check", "sample:chat"],
        ["data", "preview", "sample:chat", "--model", "demo", "--count", "1"],
        ["data", "cache"],
        ["generate", *run, "--prompt", "Hi", "--max-new-tokens", "2"],
        ["eval", *run, "--data", "sample:chat"],
        ["compare", *run, "--rows", "2", "--max-new-tokens", "2"],
    ]
    for words in lines:
        code, out, _ = answer(capsys, *words, "--json")
        assert code in ((0, 5) if words == ["doctor"] else (0,)), words
        assert json.loads(out), words


def test_removing_a_run_asks(tuned: str, place: Path, capsys: Any, monkeypatch: Any) -> None:
    shutil.copytree(place / tuned, place / "outputs/copy")
    code, _, err = answer(capsys, "runs", "rm", "copy")
    assert code == 2 and "USAGE-030" in err and "--yes" in err and (place / "outputs/copy").is_dir()
    monkeypatch.setattr(sys, "stdin", _Keyboard("n\n"))
    assert answer(capsys, "runs", "rm", "copy")[0] == 0 and (place / "outputs/copy").is_dir()
    monkeypatch.setattr(sys, "stdin", _Keyboard("y\n"))
    assert "removed outputs/copy" in answer(capsys, "runs", "rm", "copy")[1] and not (place / "outputs/copy").exists()


class _Keyboard(io.StringIO):
    """Typed text, as if at a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_list_of_runs_says_why_one_ended(capsys: Any) -> None:
    def ended(state: str, why: str) -> Standing:
        return Standing("a", "outputs/a", state, 4, 9, 1.0, 2.0, 1.0, why, "")

    cli_runs._list([ended("finished", "no improvement"), ended("failed", "TRAIN-001: the loss is nan")], Path(), False)
    out = capsys.readouterr().out
    assert "finished (no improvement)" in out and "failed (TRAIN-001)" in out
    cli_runs._list([ended("finished", "all steps done")], Path(), False)
    assert "(" not in capsys.readouterr().out


def test_commands_that_go_on_are_never_folded(tuned: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("llm_finetune_kit.terminal.width", lambda stream=None: 40)
    assert '\n  finetune generate outputs/mine --prompt "…"\n' in answer(capsys, "runs")[1]


def test_a_run_is_known_by_its_name(tuned: str, place: Path, capsys: Any) -> None:
    assert answer(capsys, "runs", "mine") == answer(capsys, "runs", "show", "mine")
    assert "outputs/mine" in answer(capsys, "runs", "mine")[1]
    code, out, err = answer(capsys, "generate", "mine", "--prompt", "Hi", "--max-new-tokens", "2")
    assert code == 0 and "mine means outputs/mine/final" in err
    assert "(cut at 2 tokens" in err and "cut at" not in out
    stopped = Path("outputs/stopped-run")
    shutil.copytree(tuned, stopped, ignore=shutil.ignore_patterns("final"))
    (Path("outputs/demo")).symlink_to("stopped-run")
    try:
        assert checked_model("stopped-run") == "stopped-run"
        assert "stopped-run is not finished: its checkpoint-2 is used" in capsys.readouterr().err
        assert find_result("demo") == Path("demo"), "the name of a model wins"
        assert checked_model("demo") == "demo"
        assert "demo is the model of that name; the run is outputs/demo" in capsys.readouterr().err
    finally:
        Path("outputs/demo").unlink()
        shutil.rmtree(stopped)


# --- generate ----------------------------------------------------------------------------------------------


def test_an_unknown_module_is_told_before_weights_are_fetched(capsys: Any) -> None:
    code, _, err = answer(capsys, "plan", "--model", "demo", "--data", "sample:chat", "lora.modules_to_save=[embed_token]")
    assert code == 2 and "error[CONFIG-062]" in err and "did you mean embed_tokens?" in err and "loading" not in err


def test_an_empty_prompt_is_refused(capsys: Any) -> None:
    code, _, err = answer(capsys, "generate", "demo", "--prompt", " ")
    assert code == 2 and "the prompt is empty" in err


ROWS: dict[str, tuple[str, list[str]]] = {
    "lines.txt": ("Where?\n\nWhy?\n", ["Where?", "Why?"]),
    "prompts.jsonl": ('{"prompt": "Where?"}\n{"prompt": "Why?"}\n', ["Where?", "Why?"]),
    "answered.jsonl": ('{"prompt": "Where?", "response": "Here."}\n', ["Where?"]),
    "instructions.json": ('[{"instruction": "Count", "input": "to three"}]', ["Count\n\nto three"]),
    "messages.jsonl": ('{"messages": [{"role": "user", "content": "Where?"}]}\n', ["Where?"]),
    "talk.jsonl": (
        json.dumps({"messages": [{"role": ("user", "assistant")[turn % 2], "content": "abcd"[turn]} for turn in range(4)]}),
        ["a", "b", "c"],
    ),
    "sharegpt.json": ('[{"conversations": [{"from": "human", "value": "Where?"}]}]', ["Where?"]),
    "questions.csv": ("question\nWhere?\n", ["Where?"]),
    "texts.jsonl": ('{"text": "Once upon"}\n', ["Once upon"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_prompts_are_read_from_rows_of_any_format(name: str, tmp_path: Path) -> None:
    text, wanted = ROWS[name]
    (tmp_path / name).write_text(text)
    found = questions(str(tmp_path / name))
    said = [message["content"] for messages in found for message in messages]
    assert [" ".join(one.split()) for one in said] == [" ".join(one.split()) for one in wanted]
    assert all(messages[-1]["role"] == "user" for messages in found)


def test_rows_without_a_question_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"foo": 3}\n')
    with pytest.raises(DataError, match="no prompt is found in the columns: foo"):
        questions(str(tmp_path / "bad.jsonl"))


def test_several_answers_stand_apart(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Where?"}\n{"prompt": "Why?"}\n')
    words = ["generate", "demo", "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "3"]
    out = answer(capsys, *words)[1]
    assert re.fullmatch(r"> Where\?\n.+?\n\n> Why\?\n.+?\n\n", out, re.DOTALL)
    rows = [json.loads(line) for line in answer(capsys, *words, "--json")[1].splitlines()]
    assert [row["prompt"] for row in rows] == ["Where?", "Why?"] and all(row["answer"] for row in rows)
    words = ["generate", "demo", "--prompt", "Where?", "--max-new-tokens", "3"]
    whole, streamed = answer(capsys, *words), answer(capsys, *words, "--stream")
    assert whole[1] == streamed[1] and whole[2] == streamed[2] == "note: ... (cut at 3 tokens; --max-new-tokens allows more)\n"


# --- chat --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tuned: str) -> Any:
    from llm_finetune_kit.opening import open_model

    return open_model(tuned, dtype="float32")


def _said(talk: Any, text: str) -> str:
    talk.hear(text)
    return "".join(talk.answer()).strip()


def test_the_base_answers_where_the_adapter_is_switched_off(opened: Any) -> None:
    from llm_finetune_kit.generation import answers
    from llm_finetune_kit.generation.conversation import Conversation

    how = GenerationSection(max_new_tokens=12)
    with opened.model.disable_adapter():
        ids = opened.chat.prompt_ids([{"role": "user", "content": "How do I reset my password?"}])
        base = answers(opened.model, opened.chat, [ids], how)[0].text
    tuned = answers(opened.model, opened.chat, [ids], how)[0].text
    talk = Conversation(opened, how)
    assert talk.answers == "tuned" and _said(talk, "How do I reset my password?") == tuned
    talk.forget()
    talk.tuned = False
    assert talk.answers == "base" and _said(talk, "How do I reset my password?") == base
    talk.forget()
    talk.tuned = True
    assert _said(talk, "How do I reset my password?") == tuned, "and back again"


def test_a_talk_is_remembered_and_cut_from_its_beginning(opened: Any) -> None:
    from llm_finetune_kit.generation.conversation import Conversation

    talk = Conversation(opened, GenerationSection(max_new_tokens=4), system="Be brief.")
    _said(talk, "one " * 60)
    assert talk.hear("two " * 60) == 0 and [message["role"] for message in talk.messages] == ["user", "assistant", "user"]
    "".join(talk.answer())
    lost = sum(talk.hear("three " * 60) for _ in range(1))
    while not lost:
        "".join(talk.answer())
        lost = talk.hear("four " * 60)
    assert lost == 2 and talk.messages[0]["content"].startswith("two") and not talk.overflows
    assert len(talk._ids()) <= talk.reads - 4
    "".join(talk.answer())
    talk.hear("five " * 900)
    assert talk.overflows and len(talk.messages) == 1
    assert "".join(talk.answer()), "it is answered all the same"


def test_an_answer_that_is_stopped_counts_as_far_as_it_went(opened: Any) -> None:
    from llm_finetune_kit.generation.conversation import Conversation

    talk = Conversation(opened, GenerationSection(max_new_tokens=200))
    talk.hear("How do I reset my password?")
    pieces = talk.answer()
    first = next(pieces)
    pieces.close()
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"].startswith(first.strip()) and len(talk.messages[1]["content"]) < 60
    talk.hear("And?")
    talk.answer().close()  # stopped before it began
    assert len(talk.messages) in (2, 3)


def test_a_chat_works_through_a_pipe(tuned: str, capsys: Any, monkeypatch: Any) -> None:
    typed = "Hello\n/base\n/tuned\n/base\nHello\n/sytem x\n/system Be brief.\n\n/reset\n//quit is text\n/quit\nnever said\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, out, err = answer(capsys, "chat", tuned, "--max-new-tokens", "3")
    assert code == 0 and len(re.findall(r".+?\n\n", out, re.DOTALL)) == 3
    assert err.count("it reads what the other side said as well") == 1
    for words in ("the base, with the adapter switched off", "did you mean /system?", "Be brief.", "forgotten"):
        assert words in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/base\nHi\n"))
    code, out, err = answer(capsys, "chat", "demo", "--max-new-tokens", "2")
    assert code == 0 and "one side only" in err and out.strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    code, out, err = answer(capsys, "chat", "demo", "--num-beams", "2")
    assert code == 0 and "USAGE-012" in err and "Traceback" not in err
    assert answer(capsys, "chat", "gtp2")[0] == 4


@pytest.mark.parametrize("size", [1, 3, 100], ids=lambda size: f"{size} letters at once")
def test_words_of_a_talk_are_not_broken_at_the_edge(size: int, capsys: Any, monkeypatch: Any) -> None:
    from llm_finetune_kit.cli_chat import _print_pieces

    monkeypatch.setattr("llm_finetune_kit.terminal.width", lambda stream=None: 20)
    text = "  She was very excited and wanted more.\n\n1. Once\n   twice, exactly to it"
    _print_pieces(iter([text[start : start + size] for start in range(0, len(text), size)]), len("base: "))
    lines = ("base: " + capsys.readouterr().out).split("\n")
    assert lines == ["base: She was very", "excited and wanted", "more.", "", "1. Once", "   twice, exactly to", "it"]
    _print_pieces(iter(["x" * 45, " y ", "字" * 40]), 0)
    assert capsys.readouterr().out.replace("\n", "").replace(" ", "") == "x" * 45 + "y" + "字" * 40


def test_a_chat_at_a_terminal_is_stopped_and_ended_by_its_keys(tuned: str, place: Path) -> None:
    ours, theirs = pty.openpty()
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    command = [*FINETUNE, "chat", tuned, "--max-new-tokens", "250", "--dtype", "float32"]
    child = subprocess.Popen(command, cwd=place, env=here, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        _until(ours, "you: ", 180)
        os.write(ours, b"/base\nWhat is a good story?\n")
        _until(ours, "base: ")
        time.sleep(0.3)
        os.kill(child.pid, signal.SIGINT)
        said = _until(ours, "you: ")
        os.write(ours, b"\x04")
        assert child.wait(timeout=60) == 0
        assert "Traceback" not in said
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def test_the_help_of_chat_names_what_it_obeys() -> None:
    from llm_finetune_kit import cli_chat

    obeyed = set(re.findall(r'"(/\w+)"', inspect.getsource(cli_chat._Chat)))
    assert obeyed - {"/exit"} == {name.partition(" ")[0] for name in cli_chat.WORDS} - {"//..."}
