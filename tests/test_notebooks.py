"""The notebooks, executed on the embedded model; they hold no outputs in the repository."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from faces import ROOT

NAMES = ("tour", "tinyllama_lora_experiment", "colab")
FORGET = "%reset -f"  # names, and not what is imported: three kernels would import torch three times


def notebook(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the cells of each notebook gave, one notebook after the other in one kernel of this interpreter."""
    place = tmp_path_factory.mktemp("notebooks")
    whole = nbformat.v4.new_notebook()
    for name in NAMES:
        whole.cells += [*notebook(name).cells, nbformat.v4.new_code_cell(FORGET)]
    for number, cell in enumerate(whole.cells):
        cell["id"] = f"cell-{number}"
    words = {
        "NOTEBOOK_STEPS": "3",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LLM_FINETUNE_KIT_CACHE": str(place / ".cache"),
        "IPYTHONDIR": str(place / ".ipython"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in words.items():
            patch.setenv(name, value)
        done = NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(place)}}).execute()
    found: dict[str, list[Any]] = {name: [] for name in NAMES}
    names = iter(NAMES)
    current = next(names)
    for cell in done.cells:
        if cell.source == FORGET:
            current = next(names, "")
        elif cell.cell_type == "code":
            found[current].append(cell.outputs)
    return found


def said(outputs: list[Any]) -> str:
    """All text that the cells printed or showed."""
    texts = [one.get("text") or one.get("data", {}).get("text/plain", "") for cell in outputs for one in cell]
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(texts))


def test_the_tour_shows_masks_a_curve_and_a_verdict(outputs: dict[str, list[Any]]) -> None:
    shown = [one.data for cell in outputs["tour"] for one in cell if one.output_type == "execute_result"]
    assert any("<mark>" in data.get("text/html", "") for data in shown) and any("image/png" in data for data in shown)
    text = said(outputs["tour"])
    assert "Better: held-out loss fell" in text and "before:" in text and "after:" in text


def test_the_experiment_leaves_its_table_its_curve_and_answers_before_and_after(outputs: dict[str, list[Any]]) -> None:
    shown = [one.data for cell in outputs["tinyllama_lora_experiment"] for one in cell if one.output_type == "execute_result"]
    assert any("ROUGE-L" in data.get("text/html", "") or "rougeL" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)
    assert any("Tell me a fun fact about elephants." in data.get("text/markdown", "") for data in shown)
    share = re.search(r"of the tokens of these rows (\d+)% are learned", said(outputs["tinyllama_lora_experiment"]))
    assert share and 50 < int(share[1]) < 100


def test_the_colab_notebook_plans_trains_and_packs(outputs: dict[str, list[Any]]) -> None:
    text = said(outputs["colab"])
    assert "No GPU" in text and "nf4 (24 GB are recommended" in text and "adapter.zip" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    for cell in notebook(name).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 25, cell.source
