"""Reports of a finished, a killed and a failed run in a real browser without a network, as a person would look at them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from chromium import PROGRAM, Browser, browser
from faces import ROOT
from llm_finetune_kit.cli import main
from llm_finetune_kit.errors import TrainingError
from llm_finetune_kit.files import damage
from llm_finetune_kit.folder import RunFolder
from llm_finetune_kit.run import run
from llm_finetune_kit.settings import changed, load_config
from nursery import Nursery

pytestmark = pytest.mark.skipif(
    PROGRAM is None and os.environ.get("CI") != "true", reason="no chromium is installed (apt-get install chromium)"
)
SECTIONS = ("verdict", "help", "learn", "answers", "warnings", "asked", "fit", "data", "use", "files", "cite")
MORE = {
    "finished": ("--max-steps", "6", "training.learning_rate=3e-3"),
    "full": ("--max-steps", "2", "method=full", "--no-compare"),
    "unmeasured": ("--max-steps", "2", "data.validation_split=0"),
}
KINDS = ("finished", "full", "killed", "failed", "unmeasured")
BASE = ("train", "--model", "demo", "--data", "sample:chat", "--run-name", "run", "training.batch_size=4")
BASE += ("evaluation.generation.max_new_tokens=8", "evaluation.rows=4")

# The contrast of every text with what is behind it (WCAG 2.1): where it is under 4.5, or under 3 for large letters.
FAINT = """(() => {
  const rgba = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => { for (let e = element; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || e.closest("style") || !e.getClientRects().length) continue;
    const [a, b] = [light(rgba(e.closest("svg") ? style.fill : style.color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.6 && style.fontWeight >= 600);
    if (ratio < (large ? 3 : 4.5)) faint.push([walker.currentNode.data.trim().slice(0, 40), ratio.toFixed(2), style.color]);
  }
  return faint;
})()"""


def kill_midway(nursery: Nursery, folder: Path) -> None:
    """SIGKILL in the middle of training, after its second evaluation."""
    knobs = ("training.eval_steps=2", "training.save_steps=2", "training.early_stopping_patience=2500")
    child = nursery.start(*BASE, "--max-steps", "5000", *knobs, "--output-dir", str(folder), output=folder / "said")
    log, until = folder / "run" / "events.jsonl", time.monotonic() + 240
    while not (log.exists() and log.read_text().count('{"event": "Evaluated"') > 2):
        assert time.monotonic() < until, (folder / "said").read_text()
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert nursery.end() == -signal.SIGKILL


def fail(folder: Path) -> None:
    """A loss that is no number: the model is infinite for the letter z, and `size` has one."""
    poisoned = Path(shutil.copytree(ROOT / "src" / "llm_finetune_kit" / "assets" / "demo", folder / "poisoned"))
    weights = load_file(poisoned / "model.safetensors")
    for piece, index in json.loads((poisoned / "tokenizer.json").read_text())["model"]["vocab"].items():
        if "z" in piece or piece == "ize":
            weights["model.embed_tokens.weight"][index] = float("inf")
    save_file(weights, poisoned / "model.safetensors", {"format": "pt"})
    asked, _ = load_config(None, ["model.name=" + str(poisoned), "data.train_file=sample:chat", "data.validation_split=0"])
    place = {"output.output_dir": str(folder), "output.run_name": "run", "training.batch_size": 1, "training.max_steps": 20}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError):
        patch.setattr("llm_finetune_kit.models.loading.check_finite", lambda path, stored: None)  # it would not even start
        run(changed(asked, place | {"evaluation.generation.max_new_tokens": 8, "training.gradient_accumulation_steps": 1}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by kind."""
    places = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    nursery = Nursery(tmp_path_factory.mktemp("cache"))
    for kind, more in MORE.items():
        words = [*BASE, *more, "--output-dir", str(places[kind])]
        nursery.start(*words, output=places[kind] / "said")
        assert nursery.end() == 0, (places[kind] / "said").read_text()
    kill_midway(nursery, places["killed"])
    nursery.close()
    fail(places["failed"])
    return {kind: place / "run" for kind, place in places.items()}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_a_killed_run_has_a_page_before_anybody_asks_for_one(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = (made["killed"] / "report.html").read_text()
    assert "Not finished: step" in page and "<h2>At work</h2>" in page and "Is it learning the right thing?" in page
    assert not (made["killed"] / "comparison.md").exists()
    assert main(["report", "--output-dir", str(made["killed"].parent)]) == 0
    assert capsys.readouterr().out.strip() == str(made["killed"] / "report.html")
    page = (made["killed"] / "report.html").read_text()
    assert "<h2>Broken off</h2>" in page and "finetune resume run" in page
    assert (made["killed"] / "comparison.md").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_whole_in_a_browser_without_a_network(kind: str, made: dict[str, Path], chromium: Browser) -> None:
    page = made[kind] / "report.html"
    assert page.stat().st_size < 5_000_000
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            chromium.open(page, width, scheme)
            chromium.script("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert chromium.script("document.documentElement.scrollWidth <= innerWidth"), f"{width}: scrolls sideways"
            assert chromium.script(FAINT) == []
            assert chromium.events("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
            asked = [event["request"]["url"] for event in chromium.events("Network.requestWillBeSent")]
            assert asked == [page.resolve().as_uri()]
    ids = chromium.script("[...document.querySelectorAll('section[id]')].map(one => one.id)")
    assert [one for one in ids if one != "standing"] == list(SECTIONS)
    assert ("standing" in ids) == (kind in ("killed", "failed"))
    assert chromium.script("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))")
    dom = chromium.script("document.documentElement.outerHTML")
    assert not re.findall(r"""(?:src|href|action|data)=["'](?!#)[^"']*|url\([^)]*|@import""", dom)
    assert str(made[kind].parent) not in dom and str(ROOT) not in dom
    # A picture has a text, a table heads for its columns, and headings do not jump.
    assert chromium.script("[...document.querySelectorAll('svg, [role=img]')].every(one => one.ariaLabel || one.ariaHidden)")
    assert chromium.script("[...document.querySelectorAll('table')].every(one => one.querySelector('thead th[scope=col]'))")
    levels = chromium.script("[...document.querySelectorAll('h1,h2,h3,h4')].map(one => +one.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_what_each_kind_of_run_tells(made: dict[str, Path], chromium: Browser) -> None:
    def text(kind: str) -> Any:
        chromium.open(made[kind] / "report.html")
        return chromium.script("document.body.innerText")

    told = text("finished")
    for words in ("95 % interval", "Wins and losses", "Did it forget?", "Before (base)", "Peak memory", "Tokens per second"):
        assert words in told, words
    assert "TRAIN-001: the loss is nan" in text("failed") and "Failed" in text("failed")
    assert "nobody can tell" in text("unmeasured")
    assert "final/ has the layout of transformers" in text("full")


def test_the_card_says_what_was_compared_and_its_folder_is_sealed(made: dict[str, Path]) -> None:
    done = RunFolder(made["finished"])
    card = (done.final / "README.md").read_text()
    found = json.loads((done.path / "eval_results.json").read_text())["comparison"]
    loss = next(one for one in found["metrics"] if one["name"] == "loss")
    assert f"| Held-out loss | {loss['rows']} | {loss['base']:.3f} | {loss['tuned']:.3f} |" in card
    assert f"{loss['low']:+.3f} to {loss['high']:+.3f}" in card
    for words in ("Seed: 42", "torch 2.", "licence CC BY-SA 4.0", "licence MIT, as this package"):
        assert words in card, words
    assert damage(done.final) is None
    assert not list(done.path.glob(".*final*"))


def test_the_code_on_the_card_works_without_this_program(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may take the embedded base from this package, and nothing else."""
    final = RunFolder(made["finished"]).final
    code = (final / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(final)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
