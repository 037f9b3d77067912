"""The shape of the house: imports only go down, heavy packages stay upstairs, and the door opens fast."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "llm_finetune_kit"
SOURCE = Path(__file__).resolve().parents[1] / "src" / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))

# DESIGN.md section 3. A folder's name stands for all its files.
FLOORS = {
    0: {"errors", "events", "files"},
    1: {"config", "catalog", "folder", "gpus", "interrupts", "left_open", "logs", "plain_yaml"},
    2: {"settings", "error_codes", "plan", "runs"},
    3: {"hardware", "models", "data"},
    4: {
        "material",
        "beginning",
        "checking",
        "doctor",
        "planning",
        "probe",
        "training",
        "generation",
        "opening",
        "starter",
        "tracking",
    }
    | {"evaluation", "report", "export", "serving", "starter"},
    5: {"run", "tuning"},
    6: {
        "api",
        "api_evaluate",
        "arguments",
        "classic",
        "classic_config",
        "cli",
        "cli_chat",
        "cli_completion",
        "cli_data",
        "cli_evaluate",
        "cli_explain",
        "cli_init",
        "cli_machine",
        "cli_runs",
        "cli_texts",
        "cli_export",
        "cli_serve",
        "cli_tune",
        "cli_ui",
        "trainers",
    }
    | {"terminal", "ui", "__init__", "__main__"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
# Work stands on work, a study on runs, and faces on faces, without circles; elsewhere only inside a sub-package.
SHARE_A_FLOOR = {4, 5, 6}
HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "gradio", "bitsandbytes", "accelerate"}
LIGHT_UPSTAIRS = [
    *(str(path.relative_to(SOURCE)) for path in (SOURCE / "data").rglob("*.py") if path.stem != "batches"),
    *(f"models/{name}.py" for name in ("__init__", "locate", "template")),
    "material.py",
    "checking.py",
]


def module_of(path: Path) -> str:
    """`data.masks` for data/masks.py, `data` for data/__init__.py and `__init__` for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported anywhere in the tree, names out of packages included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The modules of this package that a file imports, at whatever depth of its functions."""
    found = set()
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        inner = name.removeprefix(PACKAGE).lstrip(".") if name.split(".")[0] == PACKAGE else None
        if inner is None:
            continue
        known = [inner, inner.rpartition(".")[0]]
        found.add(next((module for module in known if module in MODULES), "__init__"))
    return found


def at_import(path: Path) -> set[str]:
    """Top-level packages that load when the file is imported: everything outside functions and TYPE_CHECKING."""

    def outside_functions(node: ast.AST) -> list[ast.AST]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return []
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return []
        below = [found for child in ast.iter_child_nodes(node) for found in outside_functions(child)]
        return [node, *below] if isinstance(node, ast.Import | ast.ImportFrom) else below

    nodes = outside_functions(ast.parse(path.read_text(encoding="utf-8")))
    return {name.split(".")[0] for node in nodes for name in imported(node)}


def floor_of(module: str) -> int:
    top = module.split(".")[0]
    assert top in FLOOR_OF, f"{module} has no floor: add it to FLOORS and to DESIGN.md"
    return FLOOR_OF[top]


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    for used in ours(MODULES[module]) - {"__init__"}:
        same_room = used.split(".")[0] == module.split(".")[0]
        share = same_room or floor_of(module) in SHARE_A_FLOOR
        assert floor_of(used) < floor_of(module) or (floor_of(used) == floor_of(module) and share), (
            f"{module} (floor {floor_of(module)}) must not import {used} (floor {floor_of(used)})"
        )


def test_no_import_circles() -> None:
    try:
        list(TopologicalSorter({module: ours(path) - {"__init__"} for module, path in MODULES.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_load_only_where_the_work_is(module: str) -> None:
    light = floor_of(module) < 3 or floor_of(module) > 4 or str(MODULES[module].relative_to(SOURCE)) in LIGHT_UPSTAIRS
    if light:
        assert not at_import(MODULES[module]) & HEAVY


@pytest.mark.parametrize("name", [PACKAGE, *(f"{PACKAGE}.{module}" for module in ("cli", "api", "run", "settings", "plan"))])
def test_import_is_free(name: str) -> None:
    code = f"import sys, {name}; print(*sorted({HEAVY | {'numba', 'pandas', 'scipy'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr == ""


def test_no_source_file_holds_an_absolute_path() -> None:
    places = re.compile(r"(?<![\w.~/-])/(work|home|root|Users|mnt|srv|opt|data|scratch)/|[A-Z]:\\\\")
    texts = [path for path in SOURCE.rglob("*") if path.suffix in {".py", ".jinja", ".yaml", ".json", ".jsonl", ".md"}]
    held = [f"{path.name}: {found.group()}" for path in texts if (found := places.search(path.read_text(encoding="utf-8")))]
    assert not held


def test_every_function_fits_on_a_screen() -> None:
    """STYLE.md rule 8: guard the tail, not the average."""
    long = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 80:
                    long[f"{module}.{node.name}"] = lines
    assert long == {}
