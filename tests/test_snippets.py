"""What README and the documentation tell people to type: every snippet of Python runs on the embedded model, every command line
is taken by the real parser and its settings by the real config, and those that need neither a download nor a GPU are run."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import main as script
import pytest

from conftest import DemoRun
from faces import ROOT
from llm_finetune_kit import cli, cli_data, compare_models
from llm_finetune_kit.arguments import Parser, asked_config, file_and_config
from llm_finetune_kit.config import demo_values
from llm_finetune_kit.settings import load_config
from llm_finetune_kit.tuning.space import read_space, searched_words

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"(?<!`)`((?:finetune|python main\.py) [^`]+)`")
OTHERS = ("make", "pip", "python", "python3", ".", ".venv-harness/bin/lm_eval", "OMP_NUM_THREADS=1", "jupyter", "curl", "chmod")
RUN = ("runs", "report", "explain", "models", "init", "generate", "data")  # cheap enough to be run here
# A download, what is the user's own, or a word to fill in.
NEEDS = re.compile(r"tinyllama|rm\b|cache|--fits|--stream|[A-Z]{2,}(?!-\d)")
NAMED = {("data", name) for name in cli_data.COMMANDS} | {(name,) for name in cli.COMMANDS}  # in running text: the command itself
ROWS = [{"prompt": f"Is shop {number} open today?", "response": f"Yes, shop {number} closes at 6 pm."} for number in range(4)]


class Snippet(NamedTuple):
    """Some text to type, and where it stands."""

    place: str
    text: str


def fenced(language: str, pages: Sequence[Path] = PAGES) -> list[Snippet]:
    """All code blocks of a language; `bash` counts unmarked blocks that begin with a command, too."""
    found = []
    for page in pages:
        for block in FENCE.finditer(page.read_text(encoding="utf-8")):
            commands = language == "bash" and not block[1] and block[2].startswith(("finetune ", "python "))
            if block[1] == language or commands:
                found.append(Snippet(str(page.relative_to(ROOT)), block[2]))
    return found


def plain(line: str) -> str:
    """A line without its comment, and of a pipe the part that is ours."""
    line = line.partition("  #")[0].strip()
    inner = re.search(r"\$\((finetune [^)]*)\)", line)
    parts = [part.partition(" > ")[0].strip() for part in line.split(" | ")]
    return inner[1] if inner else next((part for part in parts if part.startswith("finetune")), line)


def commands(pages: Sequence[Path] = PAGES) -> list[Snippet]:
    """Every command line, in blocks and in running text, once."""
    found: dict[str, str] = {}
    for place, text in fenced("bash", pages):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                found.setdefault(plain(line), place)
    for place, text in fenced("console", pages):
        for line in re.findall(r"^\$ (finetune .+)", text, re.M):
            found.setdefault(plain(line), place)
    for page in pages:
        for command in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            found.setdefault(command, str(page.relative_to(ROOT)))
    return [Snippet(place, text) for text, place in found.items()]


class _Parsed(BaseException):
    """Raised in the place of the work, with what the parser understood."""


@contextlib.contextmanager
def only_parsing() -> Iterator[None]:
    def stop(parser: Parser, words: list[str]) -> Any:
        raise _Parsed(parser.prog, whole(parser, words))

    whole = Parser.parse_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_all", stop)
        yield


def check_finetune(words: list[str]) -> None:
    """The real parser takes the words, and the config their settings."""
    if words[0] in ("COMMAND", "--help", "--version") or words == ["data"] or tuple(words) in NAMED:
        return
    with only_parsing():
        try:
            pytest.fail(f"exit code {cli.main(words)}")
        except _Parsed as parsed:
            program, asked = parsed.args
    command = program.split()[1]
    if command in ("train", "plan", "demo"):
        asked.words = [word for word in asked.words if "=" in word or Path(word).exists()]
        asked_config(asked, demo_values() if command == "demo" else None)
    elif command == "tune":
        searched, fixed = searched_words(word for word in asked.words if "=" in word)
        read_space(searched, load_config(None, fixed)[0])
    elif command == "resume":
        load_config(None, [word for word in (asked.run, *asked.changes) if word and "=" in word])
    elif command == "data" and getattr(asked, "words", None):
        file_and_config(asked.words, "check")


def check_other(words: list[str], line: str) -> None:
    """What is named exists: make's targets, the extras of pip, scripts and modules."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), line
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for named in re.findall(r"\[(\w+)\]'", line):
        assert re.search(rf"^{named} = \[", project, re.M), line
    for word in words:
        if word.endswith((".py", "requirements.txt")):
            assert (ROOT / word).is_file(), line


@pytest.fixture(scope="module")
def place(demo_run: DemoRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has who cloned the repository, ran the demo and keeps some rows; the demo model stands for GPT-2."""
    here = tmp_path_factory.mktemp("user")
    for name in ("main.py", "configs", "data"):
        (here / name).symlink_to(ROOT / name)
    shutil.copytree(demo_run.place / "outputs", here / "outputs")
    (here / "gpt2").symlink_to(ROOT / "src/llm_finetune_kit/assets/demo")
    for name in ("train.jsonl", "test.jsonl", "eval.jsonl"):
        (here / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (here / "chats.json").write_text(json.dumps(ROWS))
    return here


def test_every_command_is_one_that_there_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    told = commands()
    assert len(told) > 60
    for page, line in told:
        words = shlex.split(line)
        try:
            if words[0] in ("finetune", "finetune-demo"):
                check_finetune([*(["ui"] if words[0] == "finetune-demo" else []), *words[1:]])
            elif words[:2] == ["python", "main.py"]:
                asked = script.parse(words[2:])
                load_config(asked.config, asked.overrides)
            else:
                assert words[0] in OTHERS, "no command that is known here"
                check_other(words, line)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page}: {line}\n{error}")


def test_commands_that_need_nothing_are_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    tried = 0
    for page, line in commands([page for page in PAGES if page.name != "commands.md"]):
        words = shlex.split(line)[1:]
        if not line.startswith("finetune ") or words[0] not in RUN or NEEDS.search(line) or words == ["data"]:
            continue
        if words[0] in ("data", "generate", "explain") and len(words) < 2 + (words[0] != "explain"):
            continue  # only named in running text
        code = cli.main(words)
        said = capsys.readouterr()
        assert code == 0 and said.out.strip(), f"{page}: {line}\n{said.err}"
        tried += 1
    assert tried >= 12


@pytest.mark.parametrize("snippet", {one.text: one for one in fenced("python")}.values(), ids=lambda snippet: snippet.place)
def test_a_python_snippet_runs(snippet: Snippet, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for the number of steps and of rows at once."""
    monkeypatch.chdir(place)
    text = re.sub(r"(max_steps|batch_size)=\d+", r"\1=2", snippet.text)
    code = compile(text, snippet.place, "exec")
    if "from openai import" not in text:  # that needs a server; tests/test_serving.py has one
        exec(code, {"compare_models": compare_models})  # a later snippet of a page imports nothing anew
