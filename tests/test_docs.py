"""The documentation: made pages are of today, nothing public is missing, links and pictures are there, all works offline."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import docs_pictures
import llm_finetune_kit
from conftest import DemoRun
from docs_pictures import PICTURES, draw
from docs_reference import PAGES
from faces import ROOT
from llm_finetune_kit import cli, cli_data
from llm_finetune_kit.config import ALIASES, knobs
from test_snippets import FENCE

DOCS = ROOT / "docs"
TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"))}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
SCREENS = "images/ui-"  # photographs of the browser page are not drawn


@pytest.mark.parametrize("name", PAGES)
def test_a_made_page_is_what_the_program_makes_of_it(name: str) -> None:
    assert PAGES[name]() == TEXTS[DOCS / name], "run `make docs`"


def test_every_public_name_setting_and_command_is_documented() -> None:
    for name in llm_finetune_kit.__all__:
        value = getattr(llm_finetune_kit, name)
        assert f"\n### {name}\n" in TEXTS[DOCS / "python.md"] and value.__doc__, name
        assert not value.__doc__.startswith(f"{name}("), f"{name} has only what dataclass wrote"
    settings = TEXTS[DOCS / "configuration.md"]
    assert all(f"`{path}`" in settings for path in knobs())
    assert all(f"`{name}`" in settings for name, knob in ALIASES.items() if name != knob.rpartition(".")[2])
    everything = "\n".join(TEXTS.values())
    commands = [*cli.COMMANDS, *(f"data {name}" for name in cli_data.COMMANDS)]
    assert [name for name in commands if f"finetune {name}" not in everything] == []


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as the site and other readers of Markdown make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_every_link_and_picture_is_there() -> None:
    wrong = []
    for page, text in TEXTS.items():
        for target in LINK.findall(re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.S)):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            found = (page.parent / name).resolve() if name else page
            if not found.exists() or (anchor and anchor not in anchors(TEXTS.get(found, ""))):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert wrong == []


def test_every_picture_is_drawn_by_the_script_and_shown(
    tmp_path: Path, demo_run: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {str(path.relative_to(DOCS)) for folder in ("images", "diagrams") for path in (DOCS / folder).iterdir()}
    assert {name for name in there if not name.startswith(SCREENS)} == set(PICTURES)
    shown = "\n".join(TEXTS.values())
    assert [name for name in there if name not in shown] == []
    monkeypatch.setattr(docs_pictures, "demo_run", lambda: demo_run.result)
    sizes = {name: draw(name, tmp_path).stat().st_size for name in PICTURES}
    assert all(10_000 < size < 150_000 for size in sizes.values()), sizes
    drawn = (tmp_path / "images/house.svg").read_text(encoding="utf-8")
    told, kept = (re.search(r"<dc:title>(.*?)</dc:title>", text) for text in (drawn, (DOCS / "images/house.svg").read_text()))
    assert told and kept and told[1] == kept[1], "the floors have changed: python scripts/docs_pictures.py house.svg"


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) == len(list(DOCS.rglob("*.md"))) + 1  # the page for what is not found
    for page in pages:
        assert LOADED.findall(html.unescape(page.read_text(encoding="utf-8"))) == [], page.name
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
