"""The example scripts, run as they stand on the embedded model, one after the other in one folder."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import DemoRun
from faces import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL", raising=False)


def example(name: str) -> SimpleNamespace:
    """The names of a script that was loaded and not started."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name="example"))


@pytest.mark.usefixtures("_here")
def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    example("01_quickstart.py").main()
    said = capsys.readouterr().out
    assert "8 steps, about" in said and "Better: held-out loss fell" in said
    assert Path("outputs/quickstart/report.html").is_file()


@pytest.mark.usefixtures("_here")
def test_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    example("02_step_by_step.py").main()
    said = capsys.readouterr().out
    assert "24 examples" in said and "saved in outputs" in said and "held-out answers:" in said


@pytest.mark.usefixtures("_here")
def test_custom_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    example("03_custom_dataset.py").main()
    assert capsys.readouterr().out.count("It is ") >= 2, "both ways teach the form of the answer"
    assert {path.name for path in Path("outputs").iterdir()} == {"capital-rows", "capital-tokens"}


def test_custom_metric(demo_run: DemoRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(demo_run.place)
    example("04_custom_metric.py").main("outputs/demo")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ROUGE-L") and line.endswith("better") for line in lines)
    for name in ("asks_back", "CustomEvaluator"):
        assert [line.split()[1] for line in lines if line.startswith(name)] == ["0.000", "0.000"], "the base has not the manner"
        assert any(line.startswith(name) and "to 1.000" in line for line in lines), "the tuned model has it"


@pytest.mark.usefixtures("_here")
def test_the_four_uses_of_the_llama_framework(capsys: pytest.CaptureFixture[str]) -> None:
    """Alpaca, DailyDialog, both with a larger configuration, and evaluation: rows of our own in files of those names."""
    out = Path("outputs").resolve()
    example("framework.py").main([])
    said = "".join(capsys.readouterr())
    assert {path.name for path in out.iterdir()} == {"demo-alpaca", "demo-daily-dialog", "demo-both"}
    assert "20 of 20 from alpaca_data.json, 20 of 20 from dialogues_text.txt" in said
    assert said.count("perplexity ") >= 2 and "'rougeL'" in said


def test_every_example_is_tried_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'example("{path.name}")' in here for path in EXAMPLES.glob("*.py"))
